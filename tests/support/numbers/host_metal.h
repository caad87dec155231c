#pragma GCC system_header  // What g++ has beyond its standard is for these lines alone.
// The words of Metal that kernels use. What is a keyword there is the name of nothing here.
#define device
#define constant
#define threadgroup
#define thread
#define kernel
#define vertex
#define fragment
#define thread_position_in_threadgroup this_thread
#define threadgroup_position_in_grid this_block
#define threadgroups_per_grid all_blocks

typedef unsigned uint;
typedef unsigned short ushort;
typedef unsigned long ulong;
typedef float16 half;
enum class mem_flags { mem_threadgroup };

static inline void threadgroup_barrier(mem_flags) { meet_block(); }
static inline float simd_shuffle_xor(float value, ushort mask) { return shuffle_xor(value, mask); }
template <typename To, typename From>
static inline To as_type(From from) { return same_bits<To>(from); }

namespace metal {
using ::mem_flags;
using ::threadgroup_barrier;
enum memory_order { memory_order_relaxed };
// A type of its own, as there: it is neither added to nor read but by these.
struct atomic_uint { uint held; };
static inline uint atomic_load_explicit(const atomic_uint* cell, memory_order) { return cell->held; }
static inline void atomic_store_explicit(atomic_uint* cell, uint value, memory_order) { cell->held = value; }
static inline uint atomic_fetch_add_explicit(atomic_uint* cell, uint value, memory_order) {
  const uint before = cell->held;
  cell->held += value;
  return before;
}
static inline float exp2(float x) { return __builtin_exp2f(x); }
}

// MLX passes arrays of fewer than eight elements in the constant address space: no pointer to device memory is made of
// one.
template <typename T>
struct Small {
  const T* held;
  explicit Small(const T* held) : held(held) {}
  const T& operator[](size_t at) const { return held[at]; }
};
