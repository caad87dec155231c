// What the text of every kernel finds, in either language: number types, vectors, and one thread's view of its block.
#pragma once
#pragma GCC system_header  // What g++ has beyond its standard is for these lines alone.
#include <stddef.h>
#include <stdint.h>

struct alignas(8) uint2 { unsigned x, y; };
struct uint3 { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

extern uint3 this_thread, this_block, all_blocks;
void meet_block();
// The value that the lane whose number differs by `mask` gives to the same call.
float shuffle_xor(float value, unsigned mask);
constexpr unsigned WORDS = 6;
// Gives the lane's words to its warp, and returns those of lane 0, behind which are those of the others. They stay until
// the warp has given the next ones.
const unsigned (*give_words(const unsigned* words))[WORDS];

template <typename To, typename From>
static inline To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "they differ in size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

typedef _Float16 float16;

struct bfloat16 {
  uint16_t bits;
  bfloat16() = default;
  explicit bfloat16(float value) {
    const uint32_t word = same_bits<uint32_t>(value);
    // To the nearest, ties to even; NaN stays NaN.
    bits = value != value ? 0x7FC0 : (word + 0x7FFF + (word >> 16 & 1)) >> 16;
  }
  explicit operator float() const { return same_bits<float>(uint32_t(bits) << 16); }
};

// A block's shared memory, which holds NaN when the block begins.
#define SHARED_MEMORY static __attribute__((section("shared_memory")))
extern char __start_shared_memory[], __stop_shared_memory[];
static char not_empty __attribute__((section("shared_memory"), used));

extern "C" const char* run_blocks(void (*of)(void**), void** given, const unsigned* blocks, unsigned threads,
                                  char* shared, char* shared_end);
