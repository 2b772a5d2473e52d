// One pool of threads for the process. A second caller that finds it busy runs alone on its own thread, so two models
// never wait for each other and never share a core more than the operating system makes them.
#pragma once
#include <atomic>
#include <cstdint>

namespace rg {

// What the threads of one run share.
struct Team {
  int threads = 1;
  std::atomic<int> arrived{0};
  std::atomic<int> turn{0};

  // Everybody waits here for everybody.
  void barrier() {
    if (threads == 1) return;
    const int mine = turn.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
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

// Runs task(context, 0 ... n - 1, team) on n threads, n <= `threads`; returns when all are done.
void run(int threads, Task task, void *context);

template <class F>
void parallel(int threads, F &&body) {
  struct Call {
    static void go(void *context, int thread, Team &team) { (*static_cast<F *>(context))(thread, team); }
  };
  run(threads, &Call::go, static_cast<void *>(&body));
}

// Hands out [0, total) in chunks to whoever is free: a thread that the machine holds up delays nobody else.
struct Share {
  std::atomic<int64_t> next{0};
  bool take(int64_t total, int64_t chunk, int64_t &start, int64_t &stop) {
    start = next.fetch_add(chunk, std::memory_order_relaxed);
    stop = start + chunk < total ? start + chunk : total;
    return start < total;
  }
};

}  // namespace rg
