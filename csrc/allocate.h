// Allocates uninitialized tensors for results, on large pages if they are large.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace pyops {

// The first touch of newly mapped memory costs a fault for each page, and with 4 KB pages the faults take longer than
// most ops take to fill the pages. So where 2 MB pages fit, the system is asked for those.
inline at::Tensor on_large_pages(at::Tensor tensor) {
#ifdef __linux__
  constexpr uintptr_t page = 2 << 20, smallest = 2 * page;
  if (tensor.nbytes() >= smallest && tensor.is_cpu()) {
    const auto begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
    const uintptr_t first = (begin + page - 1) / page * page, last = (begin + tensor.nbytes()) / page * page;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // best effort
  }
#endif
  return tensor;
}

// at::empty, at::empty_strided and at::empty_like. On the CPU they call the functions that those reach through the
// dispatcher, whose overhead is noticeable in a small op.
inline at::Tensor allocate(at::IntArrayRef size, const at::TensorOptions& options,
                           at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  if (!options.device().is_cpu()) return at::empty(size, options, format);
  return on_large_pages(at::detail::empty_cpu(size, c10::typeMetaToScalarType(options.dtype()), false, format));
}

inline at::Tensor allocate_strided(at::IntArrayRef size, at::IntArrayRef stride, const at::TensorOptions& options) {
  if (!options.device().is_cpu()) return at::empty_strided(size, stride, options);
  return on_large_pages(at::detail::empty_strided_cpu(size, stride, c10::typeMetaToScalarType(options.dtype())));
}

// Allocates with the strides of `tensor` if it is dense, also in dimensions of one element.
inline at::Tensor allocate_like(const at::Tensor& tensor) {
  if (tensor.is_non_overlapping_and_dense())
    return allocate_strided(tensor.sizes(), tensor.strides(), tensor.options());
  return on_large_pages(at::empty_like(tensor));
}

}  // namespace pyops
