// Blocks of images as vectors: element e of image n of a block lies at block[e * lanes + n]. A block has as many images
// as a vector has lanes; where the batch has fewer, the rest are zeros. Whatever is computed of an image is then
// computed of a whole block at once, with every load aligned and no lane idle, whatever the size of a plane.
#pragma once

#include <algorithm>

#include "gemm.h"

namespace pyops::cpu {

template <class T>
void to_block(Compute<T>* block, const T* images, int64_t image_size, int64_t count) {
  constexpr int64_t lanes = Vec<Compute<T>>::size();
  if (count < lanes) std::fill_n(block, image_size * lanes, Compute<T>(0));
  transpose(block, lanes, images, image_size, count, image_size);
}

template <class T>
void from_block(T* images, const Compute<T>* block, int64_t image_size, int64_t count) {
  constexpr int64_t lanes = Vec<Compute<T>>::size();
  if constexpr (is_reduced<T>) {
    constexpr int64_t at_once = 256;  // elements, of which the transpose stays in cache
    Compute<T> rows[lanes * at_once];
    for (int64_t e = 0; e < image_size; e += at_once) {
      const int64_t elements = std::min(at_once, image_size - e);
      transpose(rows, at_once, block + e * lanes, lanes, elements, count);
      for (int64_t n = 0; n < count; ++n)
        for (int64_t i = 0; i < elements; i += lanes)
          store(images + n * image_size + e + i, Vec<Compute<T>>::loadu(rows + n * at_once + i),
                std::min(lanes, elements - i));
    }
  } else {
    transpose(images, image_size, block, lanes, image_size, count);
  }
}

// The same for bytes.
inline void bytes_to_block(uint8_t* block, const uint8_t* images, int64_t image_size, int64_t count, int64_t lanes) {
  if (count < lanes) std::fill_n(block, image_size * lanes, uint8_t{0});
  transpose_bytes(block, lanes, images, image_size, count, image_size);
}
inline void bytes_from_block(uint8_t* images, const uint8_t* block, int64_t image_size, int64_t count, int64_t lanes) {
  transpose_bytes(images, image_size, block, lanes, image_size, count);
}

}  // namespace pyops::cpu
