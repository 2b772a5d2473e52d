#include "pool.h"

#include <pthread.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace rg {
namespace {

constexpr int SPINS = 4000;  // some 50 us: longer than a gap between two products, shorter than a user would notice

inline void pause_briefly() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Pool {
  std::mutex busy;  // held by the caller whose run it is
  std::mutex sleep;
  std::condition_variable wake;
  std::vector<std::thread> workers;
  std::atomic<uint64_t> run_number{0};
  std::atomic<int> left{0};  // workers that have not finished the run
  int wanted = 0;            // workers that take part in it
  Task task = nullptr;
  void *context = nullptr;
  Team team;

  void serve(int thread, uint64_t seen) {
    for (;;) {
      int spins = 0;
      while (run_number.load(std::memory_order_acquire) == seen) {
        if (++spins < SPINS) {
          pause_briefly();
          continue;
        }
        std::unique_lock<std::mutex> lock(sleep);
        wake.wait(lock, [&] { return run_number.load(std::memory_order_acquire) != seen; });
      }
      seen = run_number.load(std::memory_order_acquire);
      if (thread <= wanted) task(context, thread, team);
      left.fetch_sub(1, std::memory_order_acq_rel);  // also those who sat out: `wanted` may change only after them
    }
  }

  void go(int threads, Task what, void *with) {
    while (static_cast<int>(workers.size()) < threads - 1) {
      const int thread = static_cast<int>(workers.size()) + 1;
      const uint64_t seen = run_number.load();
      workers.emplace_back([this, thread, seen] { serve(thread, seen); });
      workers.back().detach();
    }
    task = what;
    context = with;
    wanted = threads - 1;
    team.threads = threads;
    team.arrived.store(0);
    left.store(static_cast<int>(workers.size()), std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(sleep);
      run_number.fetch_add(1, std::memory_order_acq_rel);
    }
    wake.notify_all();
    what(with, 0, team);
    for (int spins = 0; left.load(std::memory_order_acquire) != 0; ++spins) {
      if (spins < SPINS) pause_briefly();
      else std::this_thread::yield();
    }
  }
};

// Never destroyed: workers may outlive static destruction. A forked child has no workers, so it gets a new pool.
Pool *pool = nullptr;
std::once_flag once;

void renew() { pool = new Pool; }

Pool &the_pool() {
  std::call_once(once, [] {
    renew();
    pthread_atfork(nullptr, nullptr, renew);
  });
  return *pool;
}

}  // namespace

void Team::wait_for(int mine) {
  for (int spins = 0; turn.load(std::memory_order_acquire) == mine; ++spins) {
    if (spins < SPINS) pause_briefly();
    else std::this_thread::yield();
  }
}

void run(int threads, Task task, void *context) {
  if (threads > 1) {
    Pool &shared = the_pool();
    std::unique_lock<std::mutex> mine(shared.busy, std::try_to_lock);
    if (mine.owns_lock()) {
      shared.go(threads, task, context);
      return;
    }
  }
  Team alone;
  task(context, 0, alone);
}

}  // namespace rg
