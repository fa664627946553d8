// The CPU kernels of one instruction set as a Python module (pyops._cpu_default, _cpu_avx2, _cpu_avx512) with one
// attribute, `kernels`: a capsule of the table. Plain CPython, for pybind11 would be compiled anew for each of them.
#include <Python.h>
#include <c10/macros/Macros.h>

#include "common.h"

namespace {

const pyops::Kernels kernels = {
    .relu = pyops::cpu::relu,
    .relu_backward = pyops::cpu::relu_backward,
    .relu_mask_backward = pyops::cpu::relu_mask_backward,
    .linear = pyops::cpu::linear,
    .linear_backward = pyops::cpu::linear_backward,
    .conv2d = pyops::cpu::conv2d,
    .conv2d_backward = pyops::cpu::conv2d_backward,
    .max_pool2d = pyops::cpu::max_pool2d,
    .max_pool2d_backward = pyops::cpu::max_pool2d_backward,
    .max_pool2d_gather = pyops::cpu::max_pool2d_gather,
    .max_pool2d_indices = pyops::cpu::max_pool2d_indices,
    .conv2d_relu_max_pool2d = pyops::cpu::conv2d_relu_max_pool2d,
    .conv2d_relu_max_pool2d_backward = pyops::cpu::conv2d_relu_max_pool2d_backward,
    .reads_channels_last_weight = true,
};

constexpr char name[] = C10_STRINGIZE(TORCH_EXTENSION_NAME);
PyModuleDef definition = {PyModuleDef_HEAD_INIT, name, nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC C10_CONCATENATE(PyInit_, TORCH_EXTENSION_NAME)() {
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  PyObject* table = PyCapsule_New(const_cast<pyops::Kernels*>(&kernels), nullptr, nullptr);
  const int failed = PyModule_AddObjectRef(module, "kernels", table);  // fails on a null table too
  Py_XDECREF(table);
  if (failed) Py_CLEAR(module);
  return module;
}
