// The Python module pyops._cuda. `kernels` is a capsule of the table of CUDA kernels, and the functions are those of
// csrc/algorithms_module.h. Each call runs on the current stream of the current device (csrc/device.h has made the
// tensors' device the current one) and raises torch's error if CUDA returns one. Workspaces are torch tensors: they are
// freed as soon as the launcher returns, and their memory is reused in stream order.
#include <ATen/ops/empty.h>
#include <Python.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <vector>

#include "../csrc/algorithms_module.h"
#include "algorithms.h"

namespace {

struct TorchWorkspace final : pyops::cuda::Workspace {
  std::vector<at::Tensor> arrays;
  void* allocate(int64_t bytes) override {
    arrays.push_back(at::empty({bytes}, at::TensorOptions(at::kCUDA).dtype(at::kByte)));
    return arrays.back().mutable_data_ptr();
  }
};

template <auto launcher>
struct Run;
template <class Args, cudaError_t (*launcher)(const Args&, pyops::cuda::Workspace&, cudaStream_t)>
struct Run<launcher> {
  static void run(const Args& args) {
    TorchWorkspace workspace;
    C10_CUDA_CHECK(launcher(args, workspace, c10::cuda::getCurrentCUDAStream()));
  }
};

constexpr pyops::Kernels kernels = pyops::cuda::kernel_table<Run>();

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
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cuda() {
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  PyObject* table = PyCapsule_New(const_cast<pyops::Kernels*>(&kernels), nullptr, nullptr);
  const int failed = PyModule_AddObjectRef(module, "kernels", table);  // this fails for a null table too
  Py_XDECREF(table);
  if (failed) Py_CLEAR(module);
  return module;
}
