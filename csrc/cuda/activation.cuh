// Activations and their derivatives in the type that sums are formed in. NaN stays NaN, as in PyTorch.
#pragma once

#include "norm.h"
#include "ptx.cuh"

namespace taps_fast::cuda {

template <class C>
__device__ C normal_cdf(C u) {
  return C(0.5) * (C(1) + erf(u * C(0.70710678118654752)));
}

template <class C>
__device__ C activate(Activation activation, C u) {
  switch (activation) {
    case Activation::kNone: return u;
    case Activation::kRelu: return u <= C(0) ? C(0) : u;
    case Activation::kRelu6: return u <= C(0) ? C(0) : u >= C(6) ? C(6) : u;
    case Activation::kSilu: return u / (C(1) + exp(-u));
    case Activation::kGelu: return u * normal_cdf(u);
  }
  return u;
}

/// dy · act'(u)
template <class C>
__device__ C activate_backward(Activation activation, C dy, C u) {
  switch (activation) {
    case Activation::kNone: return dy;
    case Activation::kRelu: return u <= C(0) ? C(0) : dy;
    case Activation::kRelu6: return u <= C(0) || u >= C(6) ? C(0) : dy;
    case Activation::kSilu: {
      const C s = C(1) / (C(1) + exp(-u));
      return dy * s * (C(1) + u * (C(1) - s));
    }
    case Activation::kGelu: {
      const C density = exp(C(-0.5) * u * u) * C(0.39894228040143268);
      return dy * (normal_cdf(u) + u * density);
    }
  }
  return dy;
}

}  // namespace taps_fast::cuda
