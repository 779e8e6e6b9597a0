// Activations on one vector, u -> act(u), and their gradients, dy -> dy·act'(u).
//
// float: exp is a polynomial of degree 6 after Cody and Waite's reduction, and the normal distribution of gelu is
// Abramowitz and Stegun 7.1.26, whose error of 1.5e-7 is a unit in the last place of 1. double takes the C library's.
#pragma once

#include "norm.h"
#include "simd.h"

namespace taps_fast::cpu {
namespace {

/// e^x for x <= 0, and 0 for less than -87: times it no u, however large, becomes a number, and an infinite one is NaN.
TAPS_INLINE FloatVec exp_negative(FloatVec given) {
  const FloatVec x = given < -87.0f ? splat(-87.0f) : given;
  // Adding 1.5·2^23 rounds to an integer, which is then in the low bits.
  const FloatVec shifted = x * 1.44269504f + 12582912.0f;
  const FloatVec n = shifted - 12582912.0f;
  const FloatVec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  FloatVec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return given < -87.0f ? FloatVec{} : p * (FloatVec)(((WordVec)shifted + 127) << 23);
}
TAPS_INLINE DoubleVec exp_negative(DoubleVec x) {
  for (unsigned i = 0; i < sizeof x / sizeof x[0]; i++) x[i] = __builtin_exp(x[i]);
  return x;
}

template <class V>
TAPS_INLINE V magnitude(V u) {
  return u < 0 ? -u : u;
}

template <class V>
TAPS_INLINE V sigmoid(V u) {
  const V e = exp_negative(-magnitude(u));
  const V positive = 1 / (1 + e);
  return u < 0 ? e * positive : positive;
}

/// Φ(u), given e^(-u²/2).
TAPS_INLINE FloatVec normal(FloatVec u, FloatVec bell) {
  const FloatVec t = 1 / (1 + 0.3275911f * 0.70710678f * magnitude(u));
  FloatVec p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const FloatVec tail = 0.5f * p * t * bell;
  return u < 0 ? tail : 1 - tail;
}
TAPS_INLINE DoubleVec normal(DoubleVec u, DoubleVec) {
  for (unsigned i = 0; i < sizeof u / sizeof u[0]; i++) u[i] = 0.5 * __builtin_erfc(-0.7071067811865475244 * u[i]);
  return u;
}

template <Activation kActivation, class V>
TAPS_INLINE V activate(V u) {
  // Comparisons are such that a NaN stays.
  if constexpr (kActivation == Activation::kRelu) return u < 0 ? V{} : u;
  else if constexpr (kActivation == Activation::kRelu6) return u < 0 ? V{} : u > 6 ? V{} + 6 : u;
  else if constexpr (kActivation == Activation::kSilu) return u * sigmoid(u);
  else if constexpr (kActivation == Activation::kGelu) return u * normal(u, exp_negative(u * u * -0.5f));
  else return u;
}

template <Activation kActivation, class V>
TAPS_INLINE V activate_backward(V dy, V u) {
  // Where relu passes nothing on, nothing is what an infinite dy becomes, too.
  if constexpr (kActivation == Activation::kRelu) return u <= 0 ? V{} : dy;
  else if constexpr (kActivation == Activation::kRelu6) return u <= 0 ? V{} : u >= 6 ? V{} : dy;
  else if constexpr (kActivation == Activation::kSilu) {
    const V s = sigmoid(u);
    return dy * (s * (1 + u * (1 - s)));
  } else if constexpr (kActivation == Activation::kGelu) {
    const V bell = exp_negative(u * u * -0.5f);
    return dy * (normal(u, bell) + u * bell * static_cast<decltype(u[0] + 0)>(0.3989422804014327));
  } else {
    return dy;
  }
}

}  // namespace
}  // namespace taps_fast::cpu
