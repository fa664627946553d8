// The CPU kernels of one instruction set as a Python module (pyops._cpu_default, _cpu_avx2, _cpu_avx512): `kernels` is
// a capsule of their table, and the functions are those of csrc/algorithms_module.h. It uses plain CPython, because
// pybind11 would be compiled anew for each module.
#include <c10/macros/Macros.h>

#include <cstdlib>
#include <stdexcept>

#include "../algorithms_module.h"
#include "common.h"
#include "gemm/tile_unit.h"
#include "runtime/algorithms.h"
#include "runtime/simulation.h"

namespace {

using pyops::cpu::Recorded;
using pyops::cpu::simulation;

const pyops::Kernels kernels = {
    .relu = Recorded<pyops::cpu::relu>::run,
    .relu_backward = Recorded<pyops::cpu::relu_backward>::run,
    .relu_mask_backward = Recorded<pyops::cpu::relu_mask_backward>::run,
    .linear = Recorded<pyops::cpu::linear>::run,
    .linear_backward = Recorded<pyops::cpu::linear_backward>::run,
    .conv2d = Recorded<pyops::cpu::conv2d>::run,
    .conv2d_backward = Recorded<pyops::cpu::conv2d_backward>::run,
    .max_pool2d = Recorded<pyops::cpu::max_pool2d>::run,
    .max_pool2d_backward = Recorded<pyops::cpu::max_pool2d_backward>::run,
    .max_pool2d_gather = Recorded<pyops::cpu::max_pool2d_gather>::run,
    .max_pool2d_indices = Recorded<pyops::cpu::max_pool2d_indices>::run,
    .conv2d_relu_max_pool2d = Recorded<pyops::cpu::conv2d_relu_max_pool2d>::run,
    .conv2d_relu_max_pool2d_backward = Recorded<pyops::cpu::conv2d_relu_max_pool2d_backward>::run,
    .reads_channels_last_weight = true,
};

constexpr char name[] = C10_STRINGIZE(TORCH_EXTENSION_NAME);

PyObject* algorithms(PyObject*, PyObject*) {
  return pyops::algorithms(pyops::cpu::choices::all);
}

PyObject* force_algorithm(PyObject*, PyObject* args) {
  return pyops::force_algorithm(pyops::cpu::choices::all, args);
}

PyObject* algorithm_counts(PyObject*, PyObject*) {
  PyObject* counts = pyops::algorithm_counts(pyops::cpu::choices::all);
  for (const pyops::cpu::Part* part : pyops::cpu::parts::all)
    if (counts != nullptr && !pyops::add_count(counts, part->name, part->runs)) Py_CLEAR(counts);
  return counts;
}

PyObject* simulate_threads(PyObject*, PyObject* args) {
  int threads;
  if (!PyArg_ParseTuple(args, "i", &threads)) return nullptr;
  simulation.start(threads);
  Py_RETURN_NONE;
}

PyObject* simulated_regions(PyObject*, PyObject*) {
  PyObject* regions = PyList_New(0);
  for (const auto& region : simulation.regions()) {
    if (regions == nullptr) return nullptr;
    const auto parts = static_cast<Py_ssize_t>(region.seconds.size());
    PyObject* times = PyList_New(parts);
    for (Py_ssize_t i = 0; times != nullptr && i < parts; ++i)
      PyList_SET_ITEM(times, i, PyFloat_FromDouble(region.seconds[i]));
    PyObject* entry = Py_BuildValue("(LN)", static_cast<long long>(region.tasks), times);
    if (entry == nullptr || PyList_Append(regions, entry) != 0) Py_CLEAR(regions);
    Py_XDECREF(entry);
  }
  return Py_BuildValue("(dN)", simulation.seconds(), regions);
}

PyMethodDef methods[] = {
    {"algorithms", algorithms, METH_NOARGS, "{op: [(name of an algorithm, its file)]}"},
    {"force_algorithm", force_algorithm, METH_VARARGS, "(op, name or None): computes the op by this algorithm alone"},
    {"algorithm_counts", algorithm_counts, METH_NOARGS, "{op:name of an algorithm, or a part: how often it has run}"},
    {"simulate_threads", simulate_threads, METH_VARARGS,
     "(n): simulates n threads in place of those of torch, and records anew; 0 ends the simulation"},
    {"simulated_regions", simulated_regions, METH_NOARGS,
     "(seconds of all kernels, [(tasks, seconds of each part) of each parallel region])"},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, name, nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

// Refuses a variable PYOPS_TILES that cannot be obeyed. Without the variable, nothing is decided yet.
bool is_tile_unit_valid() {
  try {
    if (std::getenv("PYOPS_TILES") != nullptr) pyops::cpu::tile_unit();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return false;
  }
  return true;
}

}  // namespace

PyMODINIT_FUNC C10_CONCATENATE(PyInit_, TORCH_EXTENSION_NAME)() {
  if (!is_tile_unit_valid()) return nullptr;
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  PyObject* table = PyCapsule_New(const_cast<pyops::Kernels*>(&kernels), nullptr, nullptr);
  const int failed = PyModule_AddObjectRef(module, "kernels", table);  // fails on a null table too
  Py_XDECREF(table);
  if (failed) Py_CLEAR(module);
  return module;
}
