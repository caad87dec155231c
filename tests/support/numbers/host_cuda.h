// The words of CUDA that kernels use, and one that MLX defines.
#define inf __builtin_inff()
#define __device__
#define __forceinline__ inline
#define __shared__
#define threadIdx this_thread
#define blockIdx this_block
#define gridDim all_blocks

static inline void __syncthreads() { meet_block(); }
static inline float __shfl_xor_sync(unsigned, float value, int mask) { return shuffle_xor(value, mask); }
static inline unsigned atomicAdd(unsigned* cell, unsigned value) {
  const unsigned before = *cell;
  *cell += value;
  return before;
}
static inline float __uint_as_float(unsigned bits) { return same_bits<float>(bits); }
static inline float16 __ushort_as_half(unsigned short bits) { return same_bits<float16>(bits); }
static inline float __half2float(float16 value) { return value; }
static inline float exp2f(float x) { return __builtin_exp2f(x); }

template <typename T>
using Small = const T*;
