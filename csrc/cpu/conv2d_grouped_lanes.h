// Convolutions of narrow groups over channels-last images, with vectors along the channels of several groups:
// conv2d_grouped_lanes.cpp. Both return false where another kernel is to do it.
#pragma once

#include "conv2d.h"

namespace pyops::cpu {

template <class T>
bool correlate_group_lanes(const Correlation<T>* phases, int64_t count);

template <class T>
bool weight_gradient_group_lanes(const Conv2dShape& s, const Source<T>& source, const T* grad_output, T* grad_weight);

}  // namespace pyops::cpu
