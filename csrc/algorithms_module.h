// What a module of kernels shows of its algorithms (csrc/algorithms.h) to Python, as functions of CPython's API that
// take the module's choices.
#pragma once

#include <Python.h>

#include "algorithms.h"

namespace pyops {

// {op: [(name of an algorithm, its file)]}
template <size_t n>
PyObject* algorithms(Choice* const (&choices)[n]) {
  PyObject* ops = PyDict_New();
  for (const Choice* choice : choices) {
    PyObject* rows = ops ? PyList_New(0) : nullptr;
    for (size_t i = 0; rows != nullptr && i < choice->count(); ++i) {
      PyObject* row = Py_BuildValue("(ss)", choice->algorithm(i).name, choice->algorithm(i).file);
      if (row == nullptr || PyList_Append(rows, row) != 0) Py_CLEAR(rows);
      Py_XDECREF(row);
    }
    if (rows == nullptr || PyDict_SetItemString(ops, choice->op(), rows) != 0) Py_CLEAR(ops);
    Py_XDECREF(rows);
  }
  return ops;
}

// force_algorithm(op, name or None) -> whether there is such an op with such an algorithm. None forces no algorithm.
template <size_t n>
PyObject* force_algorithm(Choice* const (&choices)[n], PyObject* args) {
  const char *op, *name;
  if (!PyArg_ParseTuple(args, "sz", &op, &name)) return nullptr;
  for (Choice* choice : choices) {
    if (std::string(op) != choice->op()) continue;
    int row = -1;
    for (size_t i = 0; name != nullptr && i < choice->count(); ++i)
      if (std::string(name) == choice->algorithm(i).name) row = static_cast<int>(i);
    if (name != nullptr && row < 0) Py_RETURN_FALSE;
    choice->force(row);
    Py_RETURN_TRUE;
  }
  Py_RETURN_FALSE;
}

// counts[name] = runs; false if there is an exception.
inline bool add_count(PyObject* counts, const std::string& name, const std::atomic<int64_t>& runs) {
  PyObject* count = PyLong_FromLongLong(runs.load(std::memory_order_relaxed));
  const bool added = count != nullptr && PyDict_SetItemString(counts, name.c_str(), count) == 0;
  Py_XDECREF(count);
  return added;
}

// {"op:name of an algorithm": how often it has run}
template <size_t n>
PyObject* algorithm_counts(Choice* const (&choices)[n]) {
  PyObject* counts = PyDict_New();
  for (Choice* choice : choices)
    for (size_t i = 0; counts != nullptr && i < choice->count(); ++i)
      if (!add_count(counts, std::string(choice->op()) + ":" + choice->algorithm(i).name, choice->runs(i)))
        Py_CLEAR(counts);
  return counts;
}

}  // namespace pyops
