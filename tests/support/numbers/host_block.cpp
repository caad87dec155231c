// Runs the blocks of a kernel, one after the other in any order. The threads of a block share this machine's one: each
// goes on until it waits for others, and which of those that can goes on next is drawn anew each time.
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "host_words.h"

uint3 this_thread, this_block, all_blocks;

namespace {
constexpr unsigned LANES = 32;
constexpr size_t STACK = 1 << 16;
typedef void (*Kernel)(void**);

struct Thread {
  ucontext_t start;
  jmp_buf left;
  bool started = false;
  float given[2];
  unsigned shuffles = 0;
};

struct Exchange {
  unsigned words[2][LANES][WORDS];
};

struct Meeting {
  unsigned wanted;
  std::vector<unsigned> waiting;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Meeting> warps;
  std::vector<Exchange> exchanges;
  Meeting all;
  std::vector<unsigned> ready;
  unsigned ended = 0;
};

Block* block;
jmp_buf scheduler;
Kernel kernel;
void** arrays;
unsigned now;
char fault[200];

void leave() {
  if (_setjmp(block->threads[now].left) == 0) _longjmp(scheduler, 1);
}

[[noreturn]] void fail(const char* what) {
  if (fault[0] == 0) {
    snprintf(fault, sizeof(fault), "thread %u of block (%u, %u, %u) %s", now, this_block.x, this_block.y, this_block.z,
             what);
  }
  block->ready.clear();
  _longjmp(scheduler, 1);
}

void meet(Meeting& meeting) {
  meeting.waiting.push_back(now);
  if (meeting.waiting.size() == meeting.wanted) {
    block->ready.insert(block->ready.end(), meeting.waiting.begin(), meeting.waiting.end());
    meeting.waiting.clear();
  }
  leave();
}

void enter() {
  kernel(arrays);
  block->ended++;
  _longjmp(scheduler, 1);
}

// MLX's kernels know one dimension of threads.
void go_on(unsigned number) {
  now = number;
  this_thread = {number, 0, 0};
  Thread& thread = block->threads[number];
  if (_setjmp(scheduler) != 0) return;
  if (thread.started) _longjmp(thread.left, 1);
  thread.started = true;
  setcontext(&thread.start);
}

void run_block(unsigned threads, char* stacks, std::minstd_rand& random) {
  Block own;
  own.threads.resize(threads);
  own.all.wanted = threads;
  for (unsigned first = 0; first < threads; first += LANES) own.warps.push_back({std::min(LANES, threads - first), {}});
  own.exchanges.resize(own.warps.size());
  for (unsigned number = 0; number < threads; number++) {
    ucontext_t& start = own.threads[number].start;
    getcontext(&start);
    start.uc_stack.ss_sp = stacks + number * STACK;
    start.uc_stack.ss_size = STACK;
    start.uc_link = nullptr;
    makecontext(&start, enter, 0);
    own.ready.push_back(number);
  }
  block = &own;
  while (!own.ready.empty()) {
    std::swap(own.ready[random() % own.ready.size()], own.ready.back());
    const unsigned next = own.ready.back();
    own.ready.pop_back();
    go_on(next);
  }
  if (fault[0] == 0 && own.ended != threads) {
    snprintf(fault, sizeof(fault), "%u of %u threads of block (%u, %u, %u) wait for others that never come",
             threads - own.ended, threads, this_block.x, this_block.y, this_block.z);
  }
}
}  // namespace

void meet_block() { meet(block->all); }

float shuffle_xor(float value, unsigned mask) {
  const unsigned lane = now % LANES, other = lane ^ mask;
  if (other >= block->warps[now / LANES].wanted) fail("asks for the value of a lane that its warp has not");
  // Two places in turn: whoever is slow reads while the next value is given.
  const unsigned turn = block->threads[now].shuffles++ % 2;
  block->threads[now].given[turn] = value;
  meet(block->warps[now / LANES]);
  return block->threads[now - lane + other].given[turn];
}

const unsigned (*give_words(const unsigned* words))[WORDS] {
  if (block->warps[now / LANES].wanted != LANES) fail("multiplies matrices by a warp that is not whole");
  // Two places in turn, as above.
  unsigned (*given)[WORDS] = block->exchanges[now / LANES].words[block->threads[now].shuffles++ % 2];
  std::copy(words, words + WORDS, given[now % LANES]);
  meet(block->warps[now / LANES]);
  return given;
}

// What the compiler's checks call. Their own library would end the process.
extern "C" void __ubsan_handle_out_of_bounds(void*, void*) { fail("indexes an array beyond its end"); }
extern "C" void __ubsan_handle_type_mismatch_v1(void*, void*) { fail("reads a vector where none may begin"); }

namespace {
void fail_at_access(int) { fail("reads or writes far outside its arrays"); }

// What the system says of an access ends the kernel and not the process, as long as this lives.
class Accesses {
 public:
  Accesses() {
    struct sigaction ours = {};
    ours.sa_handler = fail_at_access;
    ours.sa_flags = SA_NODEFER;
    sigaction(SIGSEGV, &ours, &before);
  }
  ~Accesses() { sigaction(SIGSEGV, &before, nullptr); }

 private:
  struct sigaction before;
};
}  // namespace

// Returns what went wrong, or nothing.
extern "C" const char* run_blocks(Kernel of, void** given, const unsigned* blocks, unsigned threads, char* shared,
                                  char* shared_end) {
  kernel = of;
  arrays = given;
  all_blocks = {blocks[0], blocks[1], blocks[2]};
  fault[0] = 0;
  const Accesses accesses;
  std::minstd_rand random(1);
  const std::unique_ptr<char[]> stacks(new char[threads * STACK]);
  std::vector<unsigned> order(blocks[0] * blocks[1] * blocks[2]);
  for (unsigned at = 0; at < order.size(); at++) order[at] = at;
  std::shuffle(order.begin(), order.end(), random);
  for (const unsigned at : order) {
    std::fill(shared, shared_end, 0xFF);
    this_block = {at % blocks[0], at / blocks[0] % blocks[1], at / blocks[0] / blocks[1]};
    run_block(threads, stacks.get(), random);
    if (fault[0] != 0) return fault;
  }
  return nullptr;
}
