// From a tensor to the kernels that can run on it, and from the ops to every device.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include "kernels.h"

namespace pyops {

// The kernels of one device, which is the current one while this lives.
class DeviceKernels {
 public:
  DeviceKernels(const Kernels& table, std::optional<c10::Device> device) : table_(table), guard_(device) {}
  const Kernels* operator->() const { return &table_; }

 private:
  const Kernels& table_;
  c10::OptionalDeviceGuard guard_;
};

// The kernels of the device that holds `tensor`; NotImplementedError if pyops has none for it. A meta tensor has those
// of the CPU, whose properties the checks look at; they are not run.
DeviceKernels kernels(const at::Tensor& tensor);

}  // namespace pyops

// The body that follows registers the ops of one file, for each device: their code on tensors is the same.
#define PYOPS_LIBRARY_IMPL(library)       \
  static void implement(torch::Library&); \
  TORCH_LIBRARY_IMPL(pyops, CPU, m) {     \
    implement(m);                         \
  }                                       \
  TORCH_LIBRARY_IMPL(pyops, CUDA, m) {    \
    implement(m);                         \
  }                                       \
  static void implement(torch::Library& library)
