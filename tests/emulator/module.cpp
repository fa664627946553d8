// A Python module of the CUDA kernels on the emulator. Its attribute `kernels` is a capsule of the table that pyops._C
// takes in place of the CPU's, because the emulated device can read pointers of CPU tensors. Workspaces are filled with
// NaN, so that a kernel that reads what it has not written is noticed.
#include <Python.h>

#include "../../csrc/algorithms_module.h"
#include "../../cuda/algorithms.h"

namespace {

struct PoisonedWorkspace final : pyops::cuda::Workspace {
  std::vector<std::unique_ptr<unsigned char[]>> arrays;
  void* allocate(int64_t bytes) override {
    arrays.emplace_back(new unsigned char[bytes]);
    std::memset(arrays.back().get(), 0xff, bytes);
    return arrays.back().get();
  }
};

// What torch's TF32 flags would say for CUDA tensors.
bool tf32 = false;
template <class Args>
void allow_tf32(Args&) {}
void allow_tf32(pyops::LinearArgs& args) {
  args.tf32 = tf32;
}
void allow_tf32(pyops::LinearBackwardArgs& args) {
  args.tf32 = tf32;
}
void allow_tf32(pyops::Conv2dArgs& args) {
  args.tf32 = tf32;
}
void allow_tf32(pyops::Conv2dBackwardArgs& args) {
  args.tf32 = tf32;
}
void allow_tf32(pyops::Conv2dReluMaxPool2dArgs& args) {
  args.conv.tf32 = tf32;
}

template <auto launcher>
struct Run;
template <class Args, cudaError_t (*launcher)(const Args&, pyops::cuda::Workspace&, cudaStream_t)>
struct Run<launcher> {
  static void run(const Args& given) {
    Args args = given;
    allow_tf32(args);
    PoisonedWorkspace workspace;
    if (launcher(args, workspace, nullptr) != cudaSuccess) emulator::fail("a launcher returned an error");
  }
};

constexpr pyops::Kernels kernels = pyops::cuda::kernel_table<Run>();

PyObject* set_order(PyObject*, PyObject* number) {
  emulator::order = static_cast<emulator::Order>(PyLong_AsLong(number));
  Py_RETURN_NONE;
}

PyObject* set_largest_32_bit_offset(PyObject*, PyObject* number) {
  emulator::largest_32_bit_offset = PyLong_AsLongLong(number);
  Py_RETURN_NONE;
}

PyObject* set_tf32(PyObject*, PyObject* allowed) {
  tf32 = PyObject_IsTrue(allowed);
  Py_RETURN_NONE;
}

PyObject* algorithms(PyObject*, PyObject*) {
  return pyops::algorithms(pyops::cuda::choices::all);
}

PyObject* force_algorithm(PyObject*, PyObject* args) {
  return pyops::force_algorithm(pyops::cuda::choices::all, args);
}

PyObject* algorithm_counts(PyObject*, PyObject*) {
  return pyops::algorithm_counts(pyops::cuda::choices::all);
}

PyMethodDef methods[] = {
    {"algorithms", algorithms, METH_NOARGS, "{op: [(name of an algorithm, its file)]}"},
    {"force_algorithm", force_algorithm, METH_VARARGS, "(op, name or None): computes the op by this algorithm alone"},
    {"algorithm_counts", algorithm_counts, METH_NOARGS, "{op:name of an algorithm: how often it has run}"},
    {"set_order", set_order, METH_O, "0: threads and blocks forward, 1: reverse, 2: shuffled, 3: by turns"},
    {"set_largest_32_bit_offset", set_largest_32_bit_offset, METH_O, "Larger ones are computed in 64 bits"},
    {"set_tf32", set_tf32, METH_O, "whether products of float32 may be of TF32"},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "emulated_kernels", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_emulated_kernels() {
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  PyObject* table = PyCapsule_New(const_cast<pyops::Kernels*>(&kernels), nullptr, nullptr);
  const int failed = PyModule_AddObjectRef(module, "kernels", table);
  Py_XDECREF(table);
  if (failed) Py_CLEAR(module);
  return module;
}
