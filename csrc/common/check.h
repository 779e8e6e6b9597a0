// Errors of the operators: one message form for the CPU and the CUDA extension.
#pragma once

#include <sstream>
#include <stdexcept>

namespace taps_fast {

template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace taps_fast
