// A str argument of an operator, which is declared as a handle: of a std::string parameter PyTorch 2.10 to 2.13 lose
// one copy at each call, and 48 bytes behind each result keep the C library from using the result's memory again.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>

#include "check.h"

namespace taps_fast {

/// The text of a handle, which the operator owns: it is freed here.
inline std::string take(StringHandle handle) {
  const char* text = nullptr;
  size_t length = 0;
  const bool read = !torch_string_c_str(handle, &text) && !torch_string_length(handle, &length);
  const std::string taken(read ? text : "", length);
  check(read && !torch_delete_string(handle), "taps_fast: a str argument could not be read");
  return taken;
}

}  // namespace taps_fast
