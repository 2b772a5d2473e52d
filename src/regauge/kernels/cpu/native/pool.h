// The threads of a run: those of torch's OpenMP where the process has it, so that two pools never wait for each other's
// cores; else one pool of our own for the process, and a second caller that finds it busy runs alone on its own thread.
// Never more of them than the CPUs that the process may use: threads that wait for one that does not run take ten times
// as long as one thread alone.
#pragma once
#include <atomic>
#include <cstdint>

namespace rg {

// What the threads of one run share.
struct Team {
  std::atomic<int> threads{1};
  std::atomic<int> arrived{0};
  std::atomic<int> turn{0};

  // Everybody waits here for everybody.
  void barrier() {
    const int all = threads.load(std::memory_order_relaxed);
    if (all == 1) return;
    const int mine = turn.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == all) {
      arrived.store(0, std::memory_order_relaxed);
      turn.store(mine + 1, std::memory_order_release);
      return;
    }
    wait_for(mine);
  }

 private:
  void wait_for(int mine);
};

using Task = void (*)(void *context, int thread, Team &team);

// CPUs that this process may use: of its affinity, and of the quota of its control group, rounded up. At least 1.
int cpus();

// Runs task(context, 0 ... n - 1, team) on n threads, n <= `threads`; returns when all are done.
void run(int threads, Task task, void *context);

template <class F>
void parallel(int threads, F &&body) {
  struct Call {
    static void go(void *context, int thread, Team &team) { (*static_cast<F *>(context))(thread, team); }
  };
  run(threads, &Call::go, static_cast<void *>(&body));
}

// Hands out [0, total) in chunks. Each thread has a run of its own and reads it from front to back; one that has
// finished takes from the backs of others, so that a thread which the machine holds up delays nobody. Threads that take
// turns at one run instead read a third slower: what the hardware fetches ahead then lands in the wrong core.
struct Share {
  static constexpr int RUNS = 16;
  std::atomic<uint64_t> taken[RUNS] = {};  // of each run, from its front (high half) and from its back (low half)

  bool take(int thread, int threads, int64_t total, int64_t chunk, int64_t &start, int64_t &stop) {
    const int runs = threads < RUNS ? threads : RUNS, own = static_cast<int>(static_cast<int64_t>(thread) * runs / threads);
    for (int k = 0; k < runs; ++k) {
      const int run = (own + k) % runs;
      const int64_t begin = total * run / runs, size = total * (run + 1) / runs - begin;
      uint64_t now = taken[run].load(std::memory_order_relaxed);
      for (;;) {
        const int64_t front = static_cast<int64_t>(now >> 32), back = static_cast<int64_t>(now & 0xffffffffu);
        const int64_t left = size - front - back, some = left < chunk ? left : chunk;
        if (some <= 0) break;
        const uint64_t then = now + (k == 0 ? static_cast<uint64_t>(some) << 32 : static_cast<uint64_t>(some));
        if (!taken[run].compare_exchange_weak(now, then, std::memory_order_relaxed)) continue;
        start = k == 0 ? begin + front : begin + size - back - some;
        stop = start + some;
        return true;
      }
    }
    return false;
  }
};

}  // namespace rg
