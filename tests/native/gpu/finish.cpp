// finish.cu on a host (host_device.h): one call, as a library.
#include "finish.cu"

static Finish given;

extern "C" int run_finish(const Finish *call, int batch, i64 shared_bytes) {
  given = *call;
  for (int sequence = 0; sequence < batch; sequence++)
    for (int head = 0; head < call->kv_heads; head++)
      for (int block = 0; block < call->blocks; block++)
        host::run_block(block, head, sequence, THREADS, (size_t)shared_bytes, [] { finish(given); });
  return 0;
}
