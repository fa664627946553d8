// Transposes between batches of images and CHWN blocks (the layout of cuda-convnet, with the batch innermost):
//
//   block[e * lanes + n] = element e of image n
//
// A block holds as many images as a vector has lanes; if the batch has fewer left, zeros take their place. Each vector
// operation then computes one element for a whole block of images: every load is aligned, and only the lanes of missing
// images are idle, whatever the size of a plane. The elements of a block keep the order that they have in the images'
// own layout.
#pragma once

#include <algorithm>

#include "../gemm/gemm.h"

namespace pyops::cpu {

// Threads split the elements at multiples of the squares that simd/transpose.h transposes at once.
constexpr int64_t square_side = 16;

template <class T>
void to_chwn(Compute<T>* block, const T* images, int64_t image_size, int64_t count, Share share) {
  constexpr int64_t lanes = Vec<Compute<T>>::size();
  const Range elements = share.of(image_size, square_side);
  block += elements.begin * lanes;
  if (count < lanes) std::fill_n(block, elements.size() * lanes, Compute<T>(0));
  transpose(block, lanes, images + elements.begin, image_size, count, elements.size());
}

template <class T>
void from_chwn(T* images, const Compute<T>* block, int64_t image_size, int64_t count, Share share) {
  constexpr int64_t lanes = Vec<Compute<T>>::size();
  const auto [begin, end] = share.of(image_size, square_side);
  if constexpr (is_reduced<T>) {
    constexpr int64_t at_once = 256;  // elements, few enough that their transpose stays in cache
    Compute<T> rows[lanes * at_once];
    for (int64_t e = begin; e < end; e += at_once) {
      const int64_t elements = std::min(at_once, end - e);
      transpose(rows, at_once, block + e * lanes, lanes, elements, count);
      for (int64_t n = 0; n < count; ++n)
        for (int64_t i = 0; i < elements; i += lanes)
          store(images + n * image_size + e + i, Vec<Compute<T>>::loadu(rows + n * at_once + i),
                std::min(lanes, elements - i));
    }
  } else {
    transpose(images + begin, image_size, block + begin * lanes, lanes, end - begin, count);
  }
}

// The transposes of bytes.
inline void bytes_to_chwn(uint8_t* block, const uint8_t* images, int64_t image_size, int64_t count, int64_t lanes,
                          Share share) {
  const Range elements = share.of(image_size, square_side);
  block += elements.begin * lanes;
  if (count < lanes) std::fill_n(block, elements.size() * lanes, uint8_t{0});
  transpose_bytes(block, lanes, images + elements.begin, image_size, count, elements.size());
}
inline void bytes_from_chwn(uint8_t* images, const uint8_t* block, int64_t image_size, int64_t count, int64_t lanes,
                            Share share) {
  const Range elements = share.of(image_size, square_side);
  transpose_bytes(images + elements.begin, image_size, block + elements.begin * lanes, lanes, elements.size(), count);
}

}  // namespace pyops::cpu
