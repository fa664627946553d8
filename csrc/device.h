// Finds the kernels for the device of a tensor, and registers the ops for every device.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include "kernels.h"

namespace pyops {

// The kernels of one device, which is the current device while this object lives.
class DeviceKernels {
 public:
  DeviceKernels(const Kernels& table, std::optional<c10::Device> device) : table_(table), guard_(device) {}
  const Kernels* operator->() const { return &table_; }

 private:
  const Kernels& table_;
  c10::OptionalDeviceGuard guard_;
};

// The kernels of the device that holds `tensor`; raises NotImplementedError if pyops has none for it. A meta tensor
// gets those of the CPU: the checks look at their properties, but they are not run.
DeviceKernels kernels(const at::Tensor& tensor);

}  // namespace pyops

// The body that follows registers the ops of one file for each device; their code on tensors is the same for all.
#define PYOPS_LIBRARY_IMPL(library)       \
  static void implement(torch::Library&); \
  TORCH_LIBRARY_IMPL(pyops, CPU, m) {     \
    implement(m);                         \
  }                                       \
  TORCH_LIBRARY_IMPL(pyops, CUDA, m) {    \
    implement(m);                         \
  }                                       \
  static void implement(torch::Library& library)
