"""The text of the decode kernel, one for CUDA and Metal: what differs between them are a few macros.

A block is one row, one key and value head with up to `GQ` of the query heads that share it, and one part of the row's
columns. A vector of keys is read by `LANES` lanes in words of 16 bytes (8 where it is packed), so that a warp reads
`32 / LANES` columns at once and each warp `UNROLL` times as many before it computes. Softmax is kept as a running
maximum and sum (Milakov and Gimelshein 2018), first in each group of lanes, then over the warps, then over the parts.

The new token's keys and values come from what the model has just computed. One block of the row writes them into
their column of the kept arrays, which are inputs: MLX does not know of it, and need not, since no other block of this
launch reads that column, and every later one that does depends on this one's result. So the arrays are never copied,
and a step may be dispatched while the one before still runs.
"""

from __future__ import annotations

import string

from adapters.kernels.text import INDICES, NUMBERS, Device, macros

PACKED = """
FN void numbers_of(uint2 w, float scale, float offset, LOCAL float* x) {
  const unsigned int words[2] = {w.x, w.y};
  for (int i = 0; i < 8; ++i) {
    x[i] = float((words[i / 4] >> (8 * (i % 4))) & 0xffu) * scale + offset;
  }
}
"""

READ = {
    False: """
        kept_k[u][n] = *(const DEVICE uint4*)(from_k + slot * 4);
        kept_v[u][n] = *(const DEVICE uint4*)(from_v + slot * 4);
""",
    True: """
        const int group = slot * VEC / GROUP;
        kept_k[u][n] = *(const DEVICE uint2*)(from_k + slot * 2);
        kept_v[u][n] = *(const DEVICE uint2*)(from_v + slot * 2);
        scale_k[u][n] = BITS_TO_FLOAT(from_k[WIDTH / 4 + group]);
        scale_v[u][n] = BITS_TO_FLOAT(from_v[WIDTH / 4 + group]);
        shift_k[u][n] = BITS_TO_FLOAT(from_k[WIDTH / 4 + GROUPS + group]);
        shift_v[u][n] = BITS_TO_FLOAT(from_v[WIDTH / 4 + GROUPS + group]);
""",
}

ATTEND = string.Template(
    """
  const int tid = $thread;
  const int lane = tid % 32, warp = tid / 32;
  const int pos = lane % LANES, sub = lane / LANES;
  const int row = $block_y, part = $block_z, parts = $blocks_z;
  const int kv_head = $block_x / CHUNKS, first = ($block_x % CHUNKS) * GQ;
  const int columns = keys_shape[2];
  const int own = offsets[row];
  const bool live = own < columns - 1;
  const int begin = (WINDOW > 0 && own + 1 > WINDOW) ? own + 1 - WINDOW : 0;
  const int share = live ? (own + 1 - begin + parts - 1) / parts : 0;
  const int from = begin + part * share;
  const int to = live ? (from + share < own + 1 ? from + share : own + 1) : from;

  const DEVICE unsigned int* new_k = (const DEVICE unsigned int*)new_keys + (row * KV_HEADS + kv_head) * WORDS;
  const DEVICE unsigned int* new_v = (const DEVICE unsigned int*)new_values + (row * KV_HEADS + kv_head) * WORDS;
  DEVICE unsigned int* all_k = (DEVICE unsigned int*)keys + (size_t)(row * KV_HEADS + kv_head) * columns * WORDS;
  DEVICE unsigned int* all_v = (DEVICE unsigned int*)values + (size_t)(row * KV_HEADS + kv_head) * columns * WORDS;
  if (live && part == 0 && first == 0) {
    for (int word = tid; word < WORDS; word += 32 * WARPS) {
      all_k[(size_t)own * WORDS + word] = new_k[word];
      all_v[(size_t)own * WORDS + word] = new_v[word];
    }
  }

  float q[GQ][NV * VEC], acc[GQ][NV * VEC], top[GQ], sum[GQ];
  for (int g = 0; g < GQ; ++g) {
    top[g] = -1e30f;
    sum[g] = 0.0f;
    for (int i = 0; i < NV * VEC; ++i) {
      const int d = ((i / VEC) * LANES + pos) * VEC + i % VEC;
      const bool there = d < WIDTH && first + g < SHARED_BY;
      const int at = ((row * KV_HEADS + kv_head) * SHARED_BY + first + g) * WIDTH + d;
      q[g][i] = there ? float(queries[at]) * SCALE : 0.0f;
      acc[g][i] = 0.0f;
    }
  }

  for (int base = from + warp * STRIDE; base < to; base += WARPS * STRIDE) {
    RAW kept_k[UNROLL][NV], kept_v[UNROLL][NV];
    $declare
    #pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int column = base + u * (32 / LANES) + sub;
      const DEVICE unsigned int* from_k = column == own ? new_k : all_k + (size_t)column * WORDS;
      const DEVICE unsigned int* from_v = column == own ? new_v : all_v + (size_t)column * WORDS;
      #pragma unroll
      for (int n = 0; n < NV; ++n) {
        const int slot = n * LANES + pos;
        if (column >= to || slot * VEC >= WIDTH) {
          $nothing
          continue;
        }
        $read
      }
    }
    float weight[UNROLL][GQ];
    #pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      for (int g = 0; g < GQ; ++g) weight[u][g] = 0.0f;
      #pragma unroll
      for (int n = 0; n < NV; ++n) {
        float x[VEC];
        numbers_of($keys_of x);
        for (int g = 0; g < GQ; ++g) {
          for (int i = 0; i < VEC; ++i) weight[u][g] += q[g][n * VEC + i] * x[i];
        }
      }
      for (int g = 0; g < GQ; ++g) {
        for (int step = 1; step < LANES; step *= 2) weight[u][g] += SHUFFLE(weight[u][g], step);
      }
    }
    for (int g = 0; g < GQ; ++g) {
      float highest = top[g];
      #pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        if (base + u * (32 / LANES) + sub < to) highest = LARGER(weight[u][g], highest);
      }
      const float fade = EXP2(top[g] - highest);
      top[g] = highest;
      sum[g] *= fade;
      for (int i = 0; i < NV * VEC; ++i) acc[g][i] *= fade;
      #pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        const bool there = base + u * (32 / LANES) + sub < to;
        weight[u][g] = there ? EXP2(weight[u][g] - highest) : 0.0f;
        sum[g] += weight[u][g];
      }
    }
    #pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      #pragma unroll
      for (int n = 0; n < NV; ++n) {
        float x[VEC];
        numbers_of($values_of x);
        for (int g = 0; g < GQ; ++g) {
          for (int i = 0; i < VEC; ++i) acc[g][n * VEC + i] += weight[u][g] * x[i];
        }
      }
    }
  }

  SHARED float sums_of[WARPS][GQ], tops_of[WARPS][GQ], parts_of[WARPS][GQ][NV * LANES * VEC];
  for (int g = 0; g < GQ; ++g) {
    for (int step = LANES; step < 32; step *= 2) {
      const float other = SHUFFLE(top[g], step);
      const float highest = LARGER(other, top[g]);
      const float mine = EXP2(top[g] - highest), theirs = EXP2(other - highest);
      sum[g] = sum[g] * mine + SHUFFLE(sum[g], step) * theirs;
      for (int i = 0; i < NV * VEC; ++i) acc[g][i] = acc[g][i] * mine + SHUFFLE(acc[g][i], step) * theirs;
      top[g] = highest;
    }
    if (lane == 0) {
      sums_of[warp][g] = sum[g];
      tops_of[warp][g] = top[g];
    }
    if (sub == 0) {
      for (int i = 0; i < NV * VEC; ++i) parts_of[warp][g][((i / VEC) * LANES + pos) * VEC + i % VEC] = acc[g][i];
    }
  }
  BARRIER();
  for (int at = tid; at < GQ * WIDTH; at += 32 * WARPS) {
    const int g = at / WIDTH, d = at % WIDTH;
    if (first + g >= SHARED_BY) continue;
    const int head = kv_head * SHARED_BY + first + g;
    float highest = tops_of[0][g];
    for (int w = 1; w < WARPS; ++w) highest = LARGER(tops_of[w][g], highest);
    float total = 0.0f, value = 0.0f;
    for (int w = 0; w < WARPS; ++w) {
      const float mine = EXP2(tops_of[w][g] - highest);
      total += sums_of[w][g] * mine;
      value += parts_of[w][g][d] * mine;
    }
    $finish
  }
"""
)

WHOLE = """
    $sink
    out[((size_t)row * KV_HEADS * SHARED_BY + head) * WIDTH + d] = live ? T(value / total) : T(0.0f);
"""

SINK = """
    const float sink = float(sinks[head]) * 1.44269504f;
    const float above = LARGER(sink, highest);
    total = total * EXP2(highest - above) + EXP2(sink - above);
    value *= EXP2(highest - above);
"""

PART = """
    DEVICE float* into = out + (((size_t)row * KV_HEADS * SHARED_BY + head) * parts + part) * (WIDTH + 2);
    into[d] = value;
    if (d == 0) {
      into[WIDTH] = highest;
      into[WIDTH + 1] = total;
    }
"""

JOIN = string.Template(
    """
  const int d = $thread;
  const int head = $block_x, row = $block_y;
  const int parts = partial_shape[2];
  if (d >= WIDTH) return;
  const DEVICE float* of = partial + ((size_t)row * KV_HEADS * SHARED_BY + head) * parts * (WIDTH + 2);
  float highest = -1e30f;
  for (int part = 0; part < parts; ++part) highest = LARGER(of[part * (WIDTH + 2) + WIDTH], highest);
  float total = 0.0f, value = 0.0f;
  for (int part = 0; part < parts; ++part) {
    const float mine = EXP2(of[part * (WIDTH + 2) + WIDTH] - highest);
    total += of[part * (WIDTH + 2) + WIDTH + 1] * mine;
    value += of[part * (WIDTH + 2) + d] * mine;
  }
  $sink
  out[((size_t)row * KV_HEADS * SHARED_BY + head) * WIDTH + d] = total == 0.0f ? T(0.0f) : T(value / total);
"""
)


def header(device: Device, numbers: str) -> str:
    """Macros, and how words become numbers: `numbers` is the name of a dtype, or `packed`."""
    return macros(device) + (PACKED if numbers == "packed" else NUMBERS[numbers])


def attend_body(device: Device, *, packed: bool, split: bool, sinks: bool) -> str:
    """Behind its `constants`. Where it is `split`, it writes parts for `join_body`."""
    names = ("scale_k", "scale_v", "shift_k", "shift_v") if packed else ()
    fields = "xy" if packed else "xyzw"
    declare = "RAW zero; " + " ".join(f"zero.{field} = 0;" for field in fields)
    declare += "".join(f" float {name}[UNROLL][NV];" for name in names)
    nothing = "kept_k[u][n] = kept_v[u][n] = zero;" + "".join(f" {name}[u][n] = 0.0f;" for name in names)
    finish = PART if split else WHOLE.replace("$sink", SINK if sinks else "")
    raw = f"  typedef {'uint2' if packed else 'uint4'} RAW;\n"
    return raw + ATTEND.substitute(
        INDICES[device],
        declare=declare,
        nothing=nothing,
        read=READ[packed],
        keys_of="kept_k[u][n], scale_k[u][n], shift_k[u][n]," if packed else "kept_k[u][n],",
        values_of="kept_v[u][n], scale_v[u][n], shift_v[u][n]," if packed else "kept_v[u][n],",
        finish=finish,
    )


def join_body(device: Device, *, sinks: bool) -> str:
    """Puts the parts of a row together."""
    return JOIN.substitute(INDICES[device], sink=SINK if sinks else "")
