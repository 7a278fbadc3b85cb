// A stand-in for the OpenMP runtime, for runs under ThreadSanitizer alone: a team is threads that are started and
// joined, which the sanitizer understands. It cannot see the order that the barriers of the stock runtime make, and
// reports a race for every parallel loop that is followed by a read. Preloaded, it takes the place of those functions
// for torch as well.
#include <pthread.h>

#include <atomic>
#include <thread>
#include <vector>

namespace {

thread_local int thread_id = 0, team_size = 1;
thread_local pthread_barrier_t* team_barrier = nullptr;
std::atomic<int> max_threads = static_cast<int>(std::thread::hardware_concurrency());

struct Member {
  Member(int id, int size, pthread_barrier_t* barrier) { thread_id = id, team_size = size, team_barrier = barrier; }
  ~Member() { thread_id = 0, team_size = 1, team_barrier = nullptr; }
};

}  // namespace

extern "C" {

int omp_get_thread_num() { return thread_id; }
int omp_get_num_threads() { return team_size; }
int omp_get_max_threads() { return max_threads; }
int omp_in_parallel() { return team_size > 1; }
void omp_set_num_threads(int count) { max_threads = count; }

void GOMP_barrier() {
  if (team_barrier) pthread_barrier_wait(team_barrier);
}

void GOMP_parallel(void (*body)(void*), void* data, unsigned wanted, unsigned) {
  const int size = team_size > 1 ? 1 : wanted ? static_cast<int>(wanted) : max_threads.load();
  if (size == 1) return body(data);
  pthread_barrier_t barrier;
  pthread_barrier_init(&barrier, nullptr, size);
  std::vector<std::thread> others;
  for (int id = 1; id < size; ++id)
    others.emplace_back([=, &barrier] {
      Member member(id, size, &barrier);
      body(data);
    });
  {
    Member member(0, size, &barrier);
    body(data);
  }
  for (auto& other : others) other.join();
  pthread_barrier_destroy(&barrier);
}

}  // extern "C"
