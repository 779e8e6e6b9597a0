#include "emulator.h"

#include <algorithm>
#include <numeric>
#include <sstream>
#include <stdexcept>

namespace emulator {
namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr int kCanary = 4096;  // bytes after shared memory that nobody may write

std::vector<Fiber> fibers;
std::vector<Block> blocks;
Barrier cluster{"cluster_sync", 0};
std::vector<Extent> memory;
const std::function<void()>* kernel;
ucontext_t scheduler;
Fiber* running;
int64_t progress;
std::string error;

void body() {
  (*kernel)();
  running->done = true;
  progress++;
  swapcontext(&running->context, &scheduler);
}

void prepare(const Launch& launch) {
  blocks.assign(launch.cluster, {});
  for (Block& b : blocks) {
    b.shared.assign(launch.shared_bytes + kCanary, 0xff);
    b.all.size = launch.threads;
    b.warps.assign(launch.threads / 32, {"a warp instruction", 32});
  }
  cluster = {"cluster_sync", launch.cluster * launch.threads};
  fibers.resize(static_cast<size_t>(launch.cluster) * launch.threads);
  for (size_t n = 0; n < fibers.size(); n++) {
    Fiber& f = fibers[n];
    f.thread = n % launch.threads;
    f.block = n / launch.threads;
    f.done = false;
    f.waits_for = nullptr;
    f.copies.clear();
    f.groups = f.exchanges = 0;
    f.stack.resize(kStackBytes);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = nullptr;
    makecontext(&f.context, body, 0);
  }
}

/// What the fibres that cannot go on are waiting for.
std::string stuck() {
  std::ostringstream s;
  s << "deadlock:";
  for (const Fiber& f : fibers)
    if (!f.done) {
      s << " thread " << f.thread << " of block " << f.block << " waits at " << f.waits_for->name << ", where "
        << f.waits_for->arrived << " of " << f.waits_for->size << " have come";
      break;
    }
  const auto done = std::count_if(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.done; });
  s << "; " << done << " threads have returned";
  return s.str();
}

void run_cluster(unsigned first_block) {
  std::vector<int> order(fibers.size());
  std::iota(order.begin(), order.end(), 0);
  std::mt19937 random(settings.seed);
  if (settings.order == "backward") std::reverse(order.begin(), order.end());
  for (size_t done = 0; done < fibers.size();) {
    if (settings.order == "random") std::shuffle(order.begin(), order.end(), random);
    const int64_t before = progress;
    for (int n : order) {
      Fiber& f = fibers[n];
      if (f.done || (f.waits_for && f.waits_for->generation == f.generation)) continue;
      running = &f;
      threadIdx = {f.thread};
      blockIdx = {first_block + f.block};
      swapcontext(&scheduler, &f.context);
      if (!error.empty()) throw std::runtime_error(error);
      done += f.done;
    }
    if (progress == before) throw std::runtime_error(stuck());
  }
  for (const Block& b : blocks)
    if (!std::all_of(b.shared.end() - kCanary, b.shared.end(), [](unsigned char c) { return c == 0xff; }))
      throw std::runtime_error("a write beyond the block's shared memory");
}

}  // namespace

void run(const Launch& launch, const std::vector<Extent>& extents, const std::function<void()>& body) {
  error.clear();
  memory = extents;
  kernel = &body;
  for (int first = 0; first < launch.blocks; first += launch.cluster) {
    prepare(launch);
    run_cluster(first);
  }
}

Fiber& current() { return *running; }
Block& block(unsigned rank) { return blocks.at(rank); }
Barrier& cluster_barrier() { return cluster; }

void fail(const std::string& what) {
  std::ostringstream s;
  s << what << " (thread " << running->thread << " of block " << blockIdx.x << ")";
  error = s.str();
  swapcontext(&running->context, &scheduler);
  std::abort();  // a fibre that failed is never resumed
}

void meet(Barrier& barrier) {
  Fiber& me = current();
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    barrier.generation++;
    progress++;
    return;
  }
  me.waits_for = &barrier;
  me.generation = barrier.generation;
  swapcontext(&me.context, &scheduler);
  me.waits_for = nullptr;
}

void touch(const void* p, int bytes, bool write) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail("a global address that is not a multiple of its size");
  const char* at = static_cast<const char*>(p);
  for (const Extent& e : memory) {
    const int64_t distance = at - static_cast<const char*>(e.start);
    if (distance < 0 || (write && !e.writable)) continue;
    const int64_t row = e.stride ? std::min(distance / e.stride, e.rows - 1) : 0;
    if (e.rows > 0 && distance - row * e.stride + bytes <= e.bytes) return;
  }
  fail(write ? "a write outside of the outputs" : "a read outside of the inputs");
}

void finish_copies(Fiber& fiber, int pending) {
  const auto late = [&](const Copy& c) { return c.group >= fiber.groups - pending; };
  for (const Copy& c : fiber.copies) {
    if (late(c)) continue;
    if (c.from) std::memcpy(c.to, c.from, 16);
    else std::memset(c.to, 0, 16);
  }
  std::erase_if(fiber.copies, [&](const Copy& c) { return !late(c); });
}

}  // namespace emulator
