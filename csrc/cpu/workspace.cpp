// Fresh pages cost more than a small layer's whole product, so each thread keeps its scratch memory until it ends.
#include "workspace.h"

#include <cstdlib>
#include <memory>
#include <new>

namespace taps_fast::cpu {
namespace {

constexpr int64_t kPage = 4096;

struct Free {
  void operator()(void* p) const { std::free(p); }
};

}  // namespace

void* workspace(int64_t bytes) {
  static thread_local std::unique_ptr<void, Free> memory;
  static thread_local int64_t size = 0;
  if (bytes > size) {
    size = 0;
    memory.reset();
    memory.reset(std::aligned_alloc(kPage, (bytes + kPage - 1) / kPage * kPage));
    if (!memory) throw std::bad_alloc();
    size = bytes;
  }
  return memory.get();
}

}  // namespace taps_fast::cpu
