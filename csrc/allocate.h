// Tensors for results: not yet written, on large pages where they are large.
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

// Memory fresh from the system costs a fault for each page that is touched first: 4 KB pages take longer than most ops
// take to fill them. So where there is room for 2 MB pages, the system is asked for those. 1x4096 -> 4096 grad_weight
// (64 MB): 40 ms without, 12 with.
inline at::Tensor on_large_pages(at::Tensor tensor) {
#ifdef __linux__
  constexpr uintptr_t page = 2 << 20, smallest = 2 * page;
  if (tensor.nbytes() >= smallest && tensor.is_cpu()) {
    const auto begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
    const uintptr_t first = (begin + page - 1) / page * page, last = (begin + tensor.nbytes()) / page * page;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a wish: may fail
  }
#endif
  return tensor;
}

// at::empty, at::empty_strided and at::empty_like. On the CPU they go where those arrive by way of the dispatcher,
// which takes 40 to 100 ns a tensor: of a relu of 8 elements a tenth.
inline at::Tensor allocate(at::IntArrayRef size, const at::TensorOptions& options,
                           at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  if (!options.device().is_cpu()) return at::empty(size, options, format);
  return on_large_pages(at::detail::empty_cpu(size, c10::typeMetaToScalarType(options.dtype()), false, format));
}

inline at::Tensor allocate_strided(at::IntArrayRef size, at::IntArrayRef stride, const at::TensorOptions& options) {
  if (!options.device().is_cpu()) return at::empty_strided(size, stride, options);
  return on_large_pages(at::detail::empty_strided_cpu(size, stride, c10::typeMetaToScalarType(options.dtype())));
}

inline at::Tensor allocate_like(const at::Tensor& tensor) {
  if (tensor.is_non_overlapping_and_dense())
    return allocate_strided(tensor.sizes(), tensor.strides(), tensor.options());
  return on_large_pages(at::empty_like(tensor));
}

}  // namespace pyops
