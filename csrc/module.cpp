// The Python module pyops._C. Importing it registers the operators (csrc/<op>.cpp) with torch. pyops/_load.py then
// passes it the CPU kernels (csrc/cpu) that were compiled for this machine's instruction set, and the CUDA kernels
// (cuda/) if they were built.
#include <pybind11/pybind11.h>

#include "autograd/node.h"
#include "device.h"

namespace pyops {
namespace {
const Kernels *cpu_kernels = nullptr, *cuda_kernels = nullptr;
}

void set_autograd(pybind11::object function);                      // csrc/autograd/dispatch.cpp
void add_path_here(const pybind11::object& tensor, Path path);     // csrc/autograd/dispatch.cpp
pybind11::object bind_operator(const pybind11::object& of_torch);  // csrc/autograd/fast_call.cpp
pybind11::object bind_checks(const pybind11::object& of_torch);    // csrc/autograd/fast_call.cpp

DeviceKernels kernels(const at::Tensor& tensor) {
  if (tensor.is_cpu() || tensor.is_meta()) {
    TORCH_CHECK(cpu_kernels, "pyops has no CPU kernels yet: use `import pyops`, which loads them, not pyops._C alone");
    return {*cpu_kernels, std::nullopt};
  }
  TORCH_CHECK_NOT_IMPLEMENTED(tensor.is_cuda(), "pyops has no kernels for the device of a tensor, ", tensor.device());
  TORCH_CHECK_NOT_IMPLEMENTED(cuda_kernels, "pyops was built without CUDA, but a tensor is on ", tensor.device(),
                              ": build it with PYOPS_CUDA=1, which says what it lacks");
  return {*cuda_kernels, tensor.device()};
}

}  // namespace pyops

PYBIND11_MODULE(_C, m) {
  m.def("set_autograd", &pyops::set_autograd);
  m.def("add_path_to_factors", [](const pybind11::object& t) { pyops::add_path_here(t, pyops::Path::factors); });
  m.def("add_path_to_input", [](const pybind11::object& t) { pyops::add_path_here(t, pyops::Path::input); });
  m.def("add_path_to_output", [](const pybind11::object& t) { pyops::add_path_here(t, pyops::Path::output); });
  m.def("bind_operator", &pyops::bind_operator);
  m.def("bind_checks", &pyops::bind_checks);
  m.def("set_cpu_kernels",
        [](const pybind11::capsule& table) { pyops::cpu_kernels = table.get_pointer<const pyops::Kernels>(); });
  m.def("set_cuda_kernels",
        [](const pybind11::capsule& table) { pyops::cuda_kernels = table.get_pointer<const pyops::Kernels>(); });
}
