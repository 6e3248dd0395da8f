"""Compiles variants here; the GPU script loads them."""
import pickle, sys, dataclasses
from pathlib import Path
from concurrent.futures import ThreadPoolExecutor
sys.path.insert(0,'benchmarks')
import prompt_cases as pc
from llmforge.kernels import compile as C, wide_attention as W
from llmforge.kernels.launch import specialised
src = Path('src/llmforge/kernels/csrc')
base = (src/'wide_attention.cu').read_text()
PP = base.replace('''            begin_scores(scores, q, factor(shared_address(keys.tile())));
            products_commit();
            begin_sums(part.sums, weights, value''','''            asm volatile("bar.sync %0, 256;" ::"r"(4 + (int)threadIdx.x / 128) : "memory");
            begin_scores(scores, q, factor(shared_address(keys.tile())));
            products_commit();
            begin_sums(part.sums, weights, value''').replace('''            products_wait<1>();
            keys.release();
            sums_ready(scores);
            weigh''','''            asm volatile("bar.arrive %0, 256;" ::"r"(5 - (int)threadIdx.x / 128) : "memory");
            products_wait<1>();
            keys.release();
            sums_ready(scores);
            weigh''').replace('''    const u64 q = factor(shared_address(queries.rows) + group * QUERY_BYTES);
''','''    const u64 q = factor(shared_address(queries.rows) + group * QUERY_BYTES);
    if (group == 1) asm volatile("bar.arrive %0, 256;" ::"r"(4) : "memory");
''')
assert PP.count('bar.sync')==1 and PP.count('bar.arrive')==2
NOEXP = base.replace("x = power_of_2(x * factor - shift);","x = x * factor - shift;")
assert NOEXP!=base
NOSOFT = base.replace('''            weigh_tile(scores, part, keep, tile);
            products_wait<0>();''','''            keep[0] = keep[1] = scores[0];
            products_wait<0>();''')
assert NOSOFT!=base
REG = base.replace("<40>","<24>").replace("<232>","<240>")
texts={'base':base,'pp':PP,'noexp':NOEXP,'nosoft':NOSOFT,'reg240':REG}
def spec_of(case, keys, text, stages=None):
    d=dict(HEAD_DIM=case.head_dim,GROUP=case.group,HEADS=case.heads,KV_HEADS=case.kv_heads,BLOCK_SIZE=case.block_size,TABLE_STRIDE=STRIDE,WINDOW=case.window or 0,CAP=int(case.soft_cap is not None),KEYS=keys,STAGES=stages)
    return d
