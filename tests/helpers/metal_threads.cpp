// Runs the threads of a kernel one at a time; see metal_shim.h and metal_emulator.py.
#include "metal_shim.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <random>
#include <vector>

extern "C" {
Lane* me;
char* buffers[32];
const long* numbers;
}

namespace {

const size_t STACK = 64 << 10, GUARD = 1 << 20, PAGE = sysconf(_SC_PAGESIZE);
std::vector<Lane> lanes;
std::vector<Simd> simds;
char message[512];
sigjmp_buf failure;  // back to `run`, from any stack
pthread_t runner;
const Program* program;
void* scheduler;

// --- stacks: what a call must keep is put on the stack, then the stacks change

#if defined(__x86_64__)
extern "C" void change(void** from, void* to);
asm(R"(
.text
.type change, @function
change:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size change, . - change
)");
void* fresh(char* stack, void (*entry)()) {
  void** top = (void**)(stack + STACK - 64);  // the entry finds it as after a call
  *--top = nullptr;
  *--top = (void*)entry;
  return top - 6;
}
#else
#include <ucontext.h>
std::vector<ucontext_t> contexts(2048);
size_t made = 0;
ucontext_t* current;
void change(void** from, void* to) {
  static ucontext_t home;
  ucontext_t* mine = from == &scheduler ? &home : (ucontext_t*)*from;
  if (from == &scheduler) *from = &home;
  swapcontext(mine, (ucontext_t*)to);
}
void* fresh(char* stack, void (*entry)()) {
  ucontext_t* context = &contexts[made++ % contexts.size()];
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = STACK;
  makecontext(context, entry, 0);
  return context;
}
#endif

void stop() {
  Lane* lane = me;
  change(&lane->stack, scheduler);
}
void entry() {
  program->body();
  me->state = DONE;
  stop();
}

char* stack(size_t number) {
  static std::vector<char*> stacks;
  while (stacks.size() <= number) {  // tops of stacks in different lines of the cache
    size_t shift = stacks.size() % 61 * 64;
    stacks.push_back((char*)mmap(nullptr, STACK + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) + shift);
  }
  return stacks[number];
}

// --- who may go on

[[noreturn]] void diverges(const char* what, int line, uint thread) {
  char text[200];
  snprintf(text, sizeof text, "%s that thread %u does not reach", what, thread);
  wrong(text, line);
}
bool all_at(size_t first, size_t end, State state, const char* what) {
  const Lane* at = nullptr;
  for (size_t i = first; i < end; i++)
    if (lanes[i].state == state) at = &lanes[i];
  if (!at) return false;
  for (size_t i = first; i < end; i++) {
    if (lanes[i].state != state || lanes[i].site != at->site) diverges(what, at->line, lanes[i].index);
    lanes[i].state = READY;
  }
  return true;
}

struct Order {  // 0 forwards, 1 backwards, else the seed of shuffles
  int kind;
  std::minstd_rand random;
  std::vector<uint> of(size_t count) {
    std::vector<uint> turn(count);
    for (size_t i = 0; i < count; i++) turn[i] = kind == 1 ? count - 1 - i : i;
    if (kind > 1) std::shuffle(turn.begin(), turn.end(), random);
    return turn;
  }
};

void run_threadgroup(uint3 group, uint3 groups, const uint* grid, const uint* size, Order& order) {
  // Metal's dispatchThreads: threadgroups at the edge are smaller
  uint3 s{std::min(size[0], grid[0] - group.x * size[0]), std::min(size[1], grid[1] - group.y * size[1]),
          std::min(size[2], grid[2] - group.z * size[2])};
  uint count = s.x * s.y * s.z;
  lanes.resize(count);
  simds.resize((count + 31) / 32);
  for (uint i = 0; i < simds.size(); i++) {
    simds[i].count = std::min(32u, count - 32 * i);
    simds[i].done = 0;
  }
  for (uint i = 0; i < count; i++) {
    Lane& lane = lanes[i];
    lane.in_group = {i % s.x, i / s.x % s.y, i / s.x / s.y};
    lane.group = group; lane.groups = groups; lane.group_size = s;
    lane.in_grid = {group.x * size[0] + lane.in_group.x, group.y * size[1] + lane.in_group.y,
                    group.z * size[2] + lane.in_group.z};
    lane.grid_size = {grid[0], grid[1], grid[2]};
    lane.index = i; lane.simd_lane = i % 32; lane.simd_group = i / 32;
    lane.simd = &simds[i / 32];
    lane.calls = lane.barriers = lane.simd_barriers = 0; lane.line = 0; lane.state = READY;
    lane.stack = fresh(stack(i), entry);
  }
  if (program->start) memset(program->start, 0xff, program->stop - program->start);
  do {
    for (uint simd : order.of(simds.size())) {
      size_t first = 32 * simd, end = first + simds[simd].count;
      do {
        for (uint i : order.of(end - first))
          if (lanes[first + i].state == READY) {
            me = &lanes[first + i];
            change(&scheduler, me->stack);
          }
      } while (all_at(first, end, SIMD, "a function of the SIMD group"));
    }
  } while (all_at(0, count, BARRIER, "a barrier"));
}

void run_all(const uint* grid, const uint* size, int kind) {
  Order order{kind, std::minstd_rand(kind + 1)};
  uint3 n{(grid[0] + size[0] - 1) / size[0], (grid[1] + size[1] - 1) / size[1], (grid[2] + size[2] - 1) / size[2]};
  for (uint i : order.of(size_t(n.x) * n.y * n.z)) run_threadgroup({i % n.x, i / n.x % n.y, i / n.x / n.y}, n, grid, size, order);
}

// --- buffers between pages that may not be touched

struct Region {
  char* data;  // of `bytes`, whole pages
  size_t bytes;
  bool used;
};
std::vector<Region> regions;
Region& region(size_t bytes) {
  bytes = (bytes + PAGE - 1) / PAGE * PAGE;
  for (Region& old : regions)
    if (!old.used && old.bytes == bytes) return old;
  char* map = (char*)mmap(nullptr, bytes + 2 * GUARD, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (bytes) mprotect(map + GUARD, bytes, PROT_READ | PROT_WRITE);
  regions.push_back({map + GUARD, bytes, false});
  return regions.back();
}
bool untouched(const char* from, const char* to) {
  return std::all_of(from, to, [](char c) { return c == char(0xff); });
}

// --- signals

void on_signal(int number, siginfo_t*, void*) {
  if (!pthread_equal(pthread_self(), runner)) {  // the clock may ring on any thread
    if (number == SIGVTALRM) pthread_kill(runner, number);
    else signal(number, SIG_DFL);
    return;
  }
  const char* what = number == SIGVTALRM ? "does not end"
                     : number == SIGILL || number == SIGFPE || number == SIGTRAP
                         ? "an index outside an array of the kernel, or arithmetic that is not defined"
                         : "access outside a buffer";
  snprintf(message, sizeof message, "%s, by thread %u of threadgroup %u %u %u", what, me->index, me->group.x,
           me->group.y, me->group.z);
  siglongjmp(failure, 1);
}
const int SIGNALS[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGVTALRM};

}  // namespace

void meet(State state, int line, int site) {
  me->state = state; me->line = line; me->site = site;
  stop();
  if (state == BARRIER) me->barriers++;
}
void wrong(const char* what, int line) {
  snprintf(message, sizeof message, "line %d: %s, by thread %u of threadgroup %u %u %u", line, what, me->index, lanes[0].group.x, lanes[0].group.y,
           lanes[0].group.z);
  siglongjmp(failure, 1);
}

// One run of a kernel. Buffers end at a page that may not be touched, or begin after one where the
// order is odd. `data` is what they hold before; `results`, where they are copied to afterwards. A
// buffer whose `results` is its `data` is used where it is. Returns 0, or 1 with a message.
extern "C" int run(const Program* which, char** data, char** results, const size_t* sizes, int count,
                   const long* given_numbers, const uint* grid, const uint* size, int order, double seconds,
                   char* message_out) {
  static char signal_stack[64 << 10];
  stack_t alternative{}, stack_before{};
  alternative.ss_sp = signal_stack; alternative.ss_size = sizeof signal_stack;
  sigaltstack(&alternative, &stack_before);
  struct sigaction mine{}, before[6];
  mine.sa_sigaction = on_signal; mine.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int i = 0; i < 6; i++) sigaction(SIGNALS[i], &mine, &before[i]);
  program = which; numbers = given_numbers; runner = pthread_self(); message[0] = 0;
  Region* taken[32];
  regions.reserve(4096);
  for (int i = 0; i < count; i++) {
    taken[i] = nullptr; buffers[i] = data[i];
    if (data[i] && data[i] == results[i]) continue;
    Region& mine = *(taken[i] = &region(sizes[i]));
    mine.used = true;
    size_t spare = mine.bytes - sizes[i];
    memset(mine.data + (order & 1 ? sizes[i] : 0), 0xff, spare);
    buffers[i] = mine.data + (order & 1 ? 0 : spare);
    if (data[i]) memcpy(buffers[i], data[i], sizes[i]);
    else memset(buffers[i], 0xff, sizes[i]);
  }
  struct itimerval clock{{0, 0}, {long(seconds), long((seconds - long(seconds)) * 1e6)}}, off{};
  setitimer(ITIMER_VIRTUAL, &clock, nullptr);
  if (sigsetjmp(failure, 1) == 0) run_all(grid, size, order);
  setitimer(ITIMER_VIRTUAL, &off, nullptr);
  for (int i = 0; i < 6; i++) sigaction(SIGNALS[i], &before[i], nullptr);
  sigaltstack(&stack_before, nullptr);
  for (int i = 0; i < count; i++) {
    if (!taken[i]) continue;
    Region& mine = *taken[i];
    mine.used = false;
    if (!message[0] && !(untouched(mine.data, buffers[i]) && untouched(buffers[i] + sizes[i], mine.data + mine.bytes)))
      snprintf(message, sizeof message, "a write outside buffer %d", i);
    if (results[i]) memcpy(results[i], buffers[i], sizes[i]);
  }
  memcpy(message_out, message, sizeof message);
  return message[0] != 0;
}
