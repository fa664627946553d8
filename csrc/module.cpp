// The Python module pyops._C. Importing it registers the operators (csrc/<op>.cpp) with torch; pyops/_load.py then
// hands it the CPU kernels (csrc/cpu) that were compiled for this machine's instruction set.
#include <pybind11/pybind11.h>

#include "device.h"

namespace pyops {
namespace {
const Kernels* cpu_kernels = nullptr;
}

void set_autograd(pybind11::object function);  // csrc/autograd.cpp

const Kernels& kernels(const at::Tensor& tensor) {
  TORCH_CHECK_NOT_IMPLEMENTED(tensor.is_cpu(), "pyops was built for the CPU only, but a tensor is on ",
                              tensor.device());
  TORCH_CHECK(cpu_kernels, "pyops has no CPU kernels yet: use `import pyops`, which loads them, not pyops._C alone");
  return *cpu_kernels;
}

}  // namespace pyops

PYBIND11_MODULE(_C, m) {
  m.def("set_autograd", &pyops::set_autograd);
  m.def("set_cpu_kernels",
        [](const pybind11::capsule& table) { pyops::cpu_kernels = table.get_pointer<const pyops::Kernels>(); });
}
