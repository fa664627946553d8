// The CPU kernels of one instruction set as a Python module (pyops._cpu_default, _cpu_avx2, _cpu_avx512): `kernels` is
// a capsule of their table, and `algorithm_counts()` tells how often each algorithm has run. It uses plain CPython,
// because pybind11 would be compiled anew for each module.
#include <Python.h>
#include <c10/macros/Macros.h>

#include "common.h"
#include "runtime/algorithms.h"

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

PyObject* algorithm_counts(PyObject*, PyObject*) {
  PyObject* counts = PyDict_New();
  for (size_t i = 0; counts != nullptr && i < pyops::cpu::algorithm_counts.size(); ++i) {
    PyObject* runs = PyLong_FromLongLong(pyops::cpu::algorithm_counts[i].load());
    if (runs == nullptr || PyDict_SetItemString(counts, pyops::cpu::algorithm_names[i], runs) != 0) Py_CLEAR(counts);
    Py_XDECREF(runs);
  }
  return counts;
}

PyMethodDef methods[] = {
    {"algorithm_counts", algorithm_counts, METH_NOARGS, "{name of an algorithm: how often it has run}"},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, name, nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

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
