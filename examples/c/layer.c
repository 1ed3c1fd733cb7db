/* One MoE layer in C: opens the experts of a checkpoint and computes a layer on the CPU.
 *
 *   python -c 'import moeinf; moeinf.ExpertStore.open("CHECKPOINT").describe("experts.txt")'
 *   export PKG_CONFIG_PATH=$(python -c 'import moeinf; print(moeinf.get_library())' | xargs
 * dirname)/pkgconfig cc -std=c99 layer.c $(pkg-config --cflags --libs moeinf) -o layer
 *   ./layer experts.txt LAYER SLOTS < input > output
 *
 * input: int32 tokens and top_k; then float32 hidden [tokens, H], int32 topk_ids and float32
 * topk_weights [tokens, top_k]. output: float32 [tokens, H]. */
#include <moeinf.h>
#include <stdio.h>
#include <stdlib.h>

static void check(moeinf_status status) {
    if (status == MOEINF_OK) return;
    fprintf(stderr, "layer: %s\n", moeinf_last_error());
    exit(1);
}

static void* read_input(size_t count, size_t element) {
    void* data = malloc(count * element + 1);
    if (data == NULL || fread(data, element, count, stdin) != count) {
        fprintf(stderr, "layer: the input ends too early\n");
        exit(1);
    }
    return data;
}

int main(int argc, char** argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: layer DESCRIPTION LAYER SLOTS < input > output\n");
        return 2;
    }
    moeinf_store* store;
    check(moeinf_store_open(argv[1], MOEINF_API_VERSION, &store));
    moeinf_store_info info;
    MOEINF_INIT(info);
    check(moeinf_store_get_info(store, &info));

    moeinf_cache_options options;
    MOEINF_INIT(options);
    options.slots = atoi(argv[3]);
    moeinf_cache* cache;
    check(moeinf_cache_create(store, &options, &cache));
    moeinf_engine_options threads;
    MOEINF_INIT(threads);
    moeinf_engine* engine;
    check(moeinf_engine_create(&threads, &engine));

    int32_t* sizes = read_input(2, sizeof *sizes);
    const size_t tokens = (size_t)sizes[0], top_k = (size_t)sizes[1];
    const size_t values = tokens * (size_t)info.hidden;
    float* hidden = read_input(values, sizeof *hidden);
    int32_t* ids = read_input(tokens * top_k, sizeof *ids);
    float* weights = read_input(tokens * top_k, sizeof *weights);
    float* out = malloc(values * sizeof *out + 1);
    if (out == NULL) return 1;

    moeinf_ffn ffn;
    MOEINF_INIT(ffn);
    ffn.layer = atoi(argv[2]);
    ffn.tokens = sizes[0];
    ffn.top_k = sizes[1];
    ffn.hidden = hidden;
    ffn.topk_ids = ids;
    ffn.topk_weights = weights;
    ffn.out = out;
    ffn.hidden_dtype = ffn.topk_weights_dtype = ffn.out_dtype = MOEINF_F32;
    ffn.prefill = tokens > 1;
    check(moeinf_fused_experts(cache, engine, &ffn));
    fwrite(out, sizeof *out, values, stdout);

    moeinf_stats stats;
    MOEINF_INIT(stats);
    check(moeinf_cache_get_stats(cache, -1, &stats));
    fprintf(stderr, "%lld experts, %lld bytes read\n", (long long)stats.accesses,
            (long long)stats.demand_bytes);
    check(moeinf_engine_destroy(engine));
    check(moeinf_cache_destroy(cache));
    check(moeinf_store_destroy(store));
    free(sizes);
    free(hidden);
    free(ids);
    free(weights);
    free(out);
    return 0;
}
