// What the convolution of narrow groups (conv2d/grouped_lanes.cpp) and its weight gradient share: how groups lie in
// vectors, the permutation of their lanes, and the taps in runs of neighbours.
#pragma once

#include <algorithm>
#include <array>

#include "algorithms.h"

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)

namespace pyops::cpu {

// ---- lanes ----

// Word i (of 32 bits) of the result is word words[i] of the value.
#if defined(CPU_CAPABILITY_AVX512)
using Permutation = __m512i;
inline Vec<float> permute(const Vec<float>& value, Permutation words) {
  return _mm512_permutexvar_ps(words, value);
}
inline Vec<double> permute(const Vec<double>& value, Permutation words) {
  return _mm512_castps_pd(_mm512_permutexvar_ps(words, _mm512_castpd_ps(value)));
}
#else
using Permutation = __m256i;
inline Vec<float> permute(const Vec<float>& value, Permutation words) {
  return _mm256_permutevar8x32_ps(value, words);
}
inline Vec<double> permute(const Vec<double>& value, Permutation words) {
  return _mm256_castps_pd(_mm256_permutevar8x32_ps(_mm256_castpd_ps(value), words));
}
#endif

// The bare register of a vector. An array of Vec would be constructed in a loop, for which gcc keeps it in memory.
template <class C>
using Register [[gnu::vector_size(sizeof(Vec<C>))]] = C;

// How groups share vectors. A group has `in` input channels and `out` output channels.
template <class C>
struct GroupLanes {
  static constexpr int64_t lanes = Vec<C>::size();

  int64_t groups, in, out;
  int64_t groups_at_once = lanes / std::max(in, out);

  int64_t vectors() const { return ceil_div(groups, groups_at_once); }
  int64_t first_group(int64_t vector) const { return vector * groups_at_once; }
  int64_t groups_of(int64_t vector) const { return std::min(groups_at_once, groups - first_group(vector)); }
  bool is_full(int64_t vector) const { return groups_of(vector) * in == lanes && in == out; }

  // For each channel of a group, the permutation that puts it into all output lanes of its group.
  const Permutation* permutations() const {
    constexpr int64_t words_of_lane = sizeof(C) / sizeof(int32_t), words = lanes * words_of_lane;
    int32_t* from = scratch<int32_t>(Scratch::permutations, in * words);
    for (int64_t i = 0; i < in * words; ++i) {
      const int64_t channel = i / words, lane = i % words / words_of_lane;
      from[i] = static_cast<int32_t>((lane / out * in + channel) * words_of_lane % words + i % words_of_lane);
    }
    return reinterpret_cast<const Permutation*>(from);
  }
};

// ---- taps ----

// A run of up to three taps of one row, which are spaced by the horizontal stride. Through tap t of the run,
// output pixel x reads the input column (x + t) * step_w + dx, which is called position x + t.
struct TapRun {
  static constexpr int64_t longest = 3;

  int64_t dy, dx;
  int64_t begin, end;  // the positions inside of the image
  bool begins_chunk;
  int64_t taps[longest];  // their indices in ConvInput::taps
  int64_t length;
};

// All taps of an input, row by row, and the chunks that sums over them are cut into.
struct TapRuns {
  TapRun* data;
  int64_t count = 0;

  template <class T>
  explicit TapRuns(const ConvInput<T>& s) : data(scratch<TapRun>(Scratch::tap_runs, s.tap_count)) {
    int64_t* order = scratch<int64_t>(Scratch::taps_of_terms, s.tap_count);
    for (int64_t t = 0; t < s.tap_count; ++t) order[t] = t;
    const auto key = [&](int64_t t) {
      const Tap& tap = s.taps[t];
      return std::array{tap.dy, (tap.dx % s.step_w + s.step_w) % s.step_w, tap.dx};
    };
    std::sort(order, order + s.tap_count, [&](int64_t a, int64_t b) { return key(a) < key(b); });
    int64_t terms = 0;
    for (int64_t i = 0; i < s.tap_count; ++i, terms += s.channels) {
      if (!continues(s, s.taps[order[i]])) begin_run(s, s.taps[order[i]], terms);
      TapRun& run = data[count - 1];
      run.taps[run.length++] = order[i];
    }
  }

  const TapRun* begin() const { return data; }
  const TapRun* end() const { return data + count; }
  int64_t bottom() const { return data[count - 1].dy; }

 private:
  template <class T>
  bool continues(const ConvInput<T>& s, const Tap& tap) const {
    if (count == 0) return false;
    const TapRun& run = data[count - 1];
    return run.length < TapRun::longest && tap.dy == run.dy && tap.dx == run.dx + run.length * s.step_w;
  }
  template <class T>
  void begin_run(const ConvInput<T>& s, const Tap& tap, int64_t& terms) {
    const auto first_from = [&](int64_t column) {  // the first position at or after the column
      return column > 0 ? ceil_div(column, s.step_w) : -(-column / s.step_w);
    };
    const bool begins_chunk = terms + TapRun::longest * s.channels > KC;
    if (begins_chunk) terms = 0;
    data[count++] = {tap.dy, tap.dx, first_from(-tap.dx), first_from(s.width - tap.dx), begins_chunk, {}, 0};
  }
};

// Calls f.operator()<value>(), where value is one of `values`.
template <int... values, class F>
C10_ALWAYS_INLINE void dispatch(int64_t value, const F& f) {
  static_cast<void>(((value == values && (f.template operator()<values>(), true)) || ...));
}

// ---- shapes ----

// Whether groups of `in` and `out` channels can share vectors of C.
template <class C>
bool can_share_vectors(int64_t groups, int64_t in, int64_t out) {
  constexpr int64_t lanes = Vec<C>::size();
  const int64_t wider = std::max(in, out);
  return groups > 1 && wider > 1 && wider <= lanes;
}

// Whether whole groups fill at least half of the lanes, or with AVX2, which has no masks for partial vectors, all.
template <class C>
bool are_worth_sharing_vectors(int64_t groups, int64_t in, int64_t out) {
  constexpr int64_t lanes = Vec<C>::size();
  const int64_t at_once = std::min(groups, lanes / std::max(in, out));
#if defined(CPU_CAPABILITY_AVX2)
  return in == out && at_once * in == lanes;
#else
  return 2 * at_once * out >= lanes;
#endif
}

}  // namespace pyops::cpu

#endif
