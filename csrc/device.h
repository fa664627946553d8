// From a tensor to the kernels that can run on it.
#pragma once

#include <ATen/core/Tensor.h>

#include "kernels.h"

namespace pyops {

// The kernels of the device that holds `tensor`; NotImplementedError if pyops has none for it.
const Kernels& kernels(const at::Tensor& tensor);

}  // namespace pyops
