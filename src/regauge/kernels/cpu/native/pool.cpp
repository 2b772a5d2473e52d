#include "pool.h"

#include <dlfcn.h>
#include <pthread.h>

#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <link.h>
#include <sched.h>
#endif

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
    try {
      while (static_cast<int>(workers.size()) < threads - 1) {
        const int thread = static_cast<int>(workers.size()) + 1;
        const uint64_t seen = run_number.load();
        workers.reserve(workers.size() + 1);
        workers.emplace_back([this, thread, seen] { serve(thread, seen); });
        workers.back().detach();
      }
    } catch (...) {  // the system gives no more: fewer do it
      threads = static_cast<int>(workers.size()) + 1;
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

// The OpenMP runtime that torch brought into this process, where there is one. Its threads spin for milliseconds after
// each of torch's own loops, so that a second pool on the same cores waits for them: 4 ms a token in the loop around a
// small model. Nothing is linked: the runtime is asked for by name, once.
struct OpenMP {
  void (*parallel)(void (*)(void *), void *, unsigned, unsigned) = nullptr;
  int (*thread)() = nullptr;
  int (*threads)() = nullptr;

  OpenMP() {
#if defined(__linux__)
    char path[4096] = "";
    dl_iterate_phdr(
        [](dl_phdr_info *info, size_t, void *found) {
          const char *name = info->dlpi_name;
          if (!name || !std::strstr(name, "libgomp") || !std::strstr(name, "torch") || std::strlen(name) >= 4096) return 0;
          std::strcpy(static_cast<char *>(found), name);
          return 1;
        },
        path);
    void *library = path[0] ? dlopen(path, RTLD_LAZY | RTLD_NOLOAD) : nullptr;
    if (!library) return;
    thread = reinterpret_cast<int (*)()>(dlsym(library, "omp_get_thread_num"));
    threads = reinterpret_cast<int (*)()>(dlsym(library, "omp_get_num_threads"));
    if (thread && threads)
      parallel = reinterpret_cast<void (*)(void (*)(void *), void *, unsigned, unsigned)>(dlsym(library, "GOMP_parallel"));
#endif
  }
};

// GNU's runtime hangs in a forked child, whose threads are gone: there our own pool serves.
std::atomic<bool> forked{false};

const OpenMP &openmp() {
  static const OpenMP found;
  static const int watched = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
  (void)watched;
  return found;
}

struct Loop {
  Task task;
  void *context;
  Team team{};

  static void go(void *data) {
    Loop &loop = *static_cast<Loop *>(data);
    const int threads = openmp().threads();  // fewer than asked for where the runtime has a limit, or inside another loop
    loop.team.threads.store(threads, std::memory_order_relaxed);
    loop.task(loop.context, openmp().thread(), loop.team);
  }
};

#if defined(__linux__)
// The control group's quota in CPUs, rounded up, or 0 for none: the least of the groups from the process's own to the
// root. Version 2, and version 1 where it is mounted as usual.
int quota_of(const char *file, const char *second) {
  char text[64] = "";
  long long limit = -1, period = 0;
  for (const char *path : {file, second}) {
    if (!path) break;
    std::FILE *from = std::fopen(path, "re");
    if (!from) return 0;
    const size_t some = std::fread(text, 1, sizeof text - 1, from);
    text[some] = 0;
    std::fclose(from);
    if (second) std::sscanf(text, "%lld", path == file ? &limit : &period);
    else std::sscanf(text, "%lld %lld", &limit, &period);  // "max" leaves -1
  }
  return limit > 0 && period > 0 ? static_cast<int>((limit + period - 1) / period) : 0;
}

int quota() {
  int least = quota_of("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  char line[4096];
  std::FILE *from = std::fopen("/proc/self/cgroup", "re");
  if (!from) return least;
  while (std::fgets(line, sizeof line, from)) {
    if (std::strncmp(line, "0::", 3) != 0) continue;
    char path[4400];
    char *own = line + 3;
    own[std::strcspn(own, "\n")] = 0;
    for (;;) {
      std::snprintf(path, sizeof path, "/sys/fs/cgroup%s/cpu.max", std::strcmp(own, "/") ? own : "");
      const int found = quota_of(path, nullptr);
      if (found && (!least || found < least)) least = found;
      char *last = std::strrchr(own, '/');
      if (!last || !*own) break;
      *last = 0;
    }
  }
  std::fclose(from);
  return least;
}
#endif

// Never destroyed: workers may outlive static destruction. A forked child has no workers, so it gets a new pool.
Pool *pool = nullptr;
std::once_flag once;

void renew() { pool = new (std::nothrow) Pool; }

Pool *the_pool() {
  std::call_once(once, [] {
    renew();
    pthread_atfork(nullptr, nullptr, renew);
  });
  return pool;
}

}  // namespace

int cpus() {
#if defined(__linux__)
  static const int allowed = quota();  // a quota that changes later is not seen; affinity is asked for each time
  cpu_set_t set;
  int found = 0;
  if (sched_getaffinity(0, sizeof set, &set) == 0) found = CPU_COUNT(&set);
  else found = static_cast<int>(std::thread::hardware_concurrency());  // more CPUs than the set holds
  if (allowed && allowed < found) found = allowed;
#else
  const int found = static_cast<int>(std::thread::hardware_concurrency());
#endif
  return found > 0 ? found : 1;
}

void Team::wait_for(int mine) {
  for (int spins = 0; turn.load(std::memory_order_acquire) == mine; ++spins) {
    if (spins < SPINS) pause_briefly();
    else std::this_thread::yield();
  }
}

void run(int threads, Task task, void *context) {
  if (threads > 1) {
    const int most = cpus();
    threads = threads < most ? threads : most;
  }
  if (threads > 1 && openmp().parallel && !forked.load(std::memory_order_relaxed)) {
    Loop loop{task, context};
    openmp().parallel(&Loop::go, &loop, static_cast<unsigned>(threads), 0);
    return;
  }
  if (Pool *shared = threads > 1 ? the_pool() : nullptr) {
    std::unique_lock<std::mutex> mine(shared->busy, std::try_to_lock);
    if (mine.owns_lock()) {
      shared->go(threads, task, context);
      return;
    }
  }
  Team alone;
  task(context, 0, alone);
}

}  // namespace rg
