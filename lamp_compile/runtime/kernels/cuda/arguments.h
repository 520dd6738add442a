// Arguments of finish.cu, in the order of finish.py's.
struct Finish {
  const char *q8;            // int8 [heads, GP, 2 * HALF_K]
  float *rowinfo;            // [heads, 7, GP]; the last of them counts blocks that are done
  const u8 *k_high, *k_low;  // [heads, tiles, TILE, HALF_K]
  const u16 *k_scale;        // float16 [heads, tiles, TILE]
  const u8 *v_high, *v_low;  // [heads, tiles, HALF_V, TILE]
  const u16 *v_scale;
  const float *partial;         // of the look-ahead [heads, slots, GP, 2 * HALF_V]
  const float *meta;            // [heads, slots, 7, GP]
  const float *energy;          // [heads, subtiles, GP]
  const float *peak;            // [heads, subtiles]
  float *left;                  // room for what blocks leave [heads, blocks, LEFT]
  const void *sinks;            // [kv_heads * GROUP], or null
  const void *start, *lengths;  // a number per sequence, or null
  void *out;                    // [heads, GROUP, 2 * HALF_V]
  float *lse;                   // [heads, GROUP]
  float *certificate;           // [heads, GROUP, 3]
  float *state;                 // [heads, 4]
  i64 *stats;                   // [heads, 7]
  const float *floor, *budget;
  i64 plane_keys;  // from one head's keys to the next one's
  float scale, root, softcap, hysteresis;
  int blocks;     // to one head
  u32 per_block;  // 2^18 / blocks, rounded up: a whole number below 8192 + 16 times this is its quotient
  int rotates;    // whether the output is
  int kv_heads, keys, subtiles, slots, splits, window, hold;
  int start_step, length_step, floor_step, budget_step;  // from one sequence to the next
  int start_wide, length_wide;                           // 64 bits, not 32
  int attention_window;                                  // 0 none
  int causal;                                            // 0 no, 1 top left, 2 bottom right
  int sink_kind, out_kind;                               // 0 float32, 1 float16, 2 bfloat16
};
