import sys, json, time, os
from pathlib import Path
import torch
sys.path.insert(0,'benchmarks'); sys.path.insert(0,'gpu_study')
t0=time.time()
import dataclasses
import prompt_cases as pc
from prompt_cases import *
from attention_cases import TOLERANCE
from llmforge.kernels import compile as C
from llmforge.kernels.driver import BoundLaunch, Module, Sizes
from concurrent.futures import ThreadPoolExecutor
from cuda_speed import replayed
OUT=Path(os.environ['OUT'])
log=open(OUT/'study.log','w')
def say(*a):
    print(*a, flush=True); print(*a, file=log, flush=True)
images={}
def module(spec):
    if spec.key not in images:
        images[spec.key]=Module(C.compile_kernel(spec,'sm_90').image, spec.entry)
    return images[spec.key]
sizes=Sizes(("tokens","sequences","longest_query","processors"))
sizes.set("processors",torch.cuda.get_device_properties(0).multi_processor_count)
def bind(launch,t,case):
    sizes.set("tokens",sum(case.tokens)); sizes.set("sequences",len(case.tokens)); sizes.set("longest_query",max(case.tokens))
    return BoundLaunch(launch,module(launch.kernel),lambda n:t[n].data_ptr(),sizes,overlap=True)
def precompile(launches_):
    specs={l.kernel.key:l.kernel for l in launches_}
    with ThreadPoolExecutor(12) as pool: 
        res=dict(zip(specs,pool.map(lambda s:C.compile_kernel(s,'sm_90'),specs.values())))
    for k,s in specs.items():
        if k not in images: images[k]=Module(res[k].image,s.entry)
torch.zeros(1).cuda()
# 1. correctness, small
BIG=(
 Prompts((1024,)*8,(0,)*8,head_dim=128,kv_heads=8,block_size=32),
 Prompts((1024,300,1,1,77,500),(0,129,1000,3000,64,2000),head_dim=128,kv_heads=8,block_size=32),
 Prompts((1,)*100+(600,),tuple(range(40,5040,50))+(40,),head_dim=64,kv_heads=8,block_size=16),
 Prompts((700,1,90),(800,5000,10),head_dim=128,kv_heads=2,window=512,block_size=32),
 Prompts((700,1,90),(800,5000,10),head_dim=256,kv_heads=2,soft_cap=30.0,window=4096,block_size=32),
)
small=[(c,drawn(c,i)) for i,c in enumerate(PROMPTS)]
precompile([l for c,t in small for l in launches(c,t)])
def run_on(case,t,wide=True):
    for l in launches(case,t,wide=wide): bind(l,t,case)(torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
for c,t in small:
    def run(launch,tensors,n,s):
        there={k:v.cuda() for k,v in tensors.items()}
        bind(launch,there,c)(torch.cuda.current_stream().cuda_stream); torch.cuda.synchronize()
        for k,v in there.items(): tensors[k].copy_(v)
    off=compare(c,t,run); say('small','WRONG' if not off<=TOLERANCE[c.dtype] else 'ok',f'{off:.2e}',c)
def gpu_drawn(case,seed):
    torch.manual_seed(seed); size=case.block_size
    needed=[-(-n//size) for n in case.lens]; order=torch.randperm(sum(needed)+2,dtype=torch.int32)
    table=torch.full((len(needed),max(needed)+1),1<<20,dtype=torch.int32); used=0
    for s,b in enumerate(needed): table[s,:b]=order[used:used+b]; used+=b
    dt=DTYPES[case.dtype]; tokens=sum(case.tokens)
    caches=torch.randn(2,len(order),size,case.kv_heads,case.head_dim,device='cuda').to(dt)
    starts=torch.tensor((0,*case.tokens)).cumsum(0).to(torch.int32)
    feats=case.heads*case.head_dim
    return {"q":torch.randn(tokens,feats,device='cuda').to(dt),"keys":caches[0].clone(),"values":caches[1].clone(),"query_starts":starts.cuda(),
      "kv_lens":torch.tensor(case.lens,dtype=torch.int32).cuda(),"block_table":table.cuda(),
      "items":torch.full((1+case.plan.items(tokens,len(needed)),4),-9,dtype=torch.int32,device='cuda'),
      "out":torch.full((tokens,feats),torch.nan,dtype=dt,device='cuda')}
def off_rows(a,b,hd):
    a,b=(x.unflatten(-1,(-1,hd)).float() for x in (a,b))
    return float(((a-b).norm(dim=-1)/b.norm(dim=-1)).nan_to_num(torch.inf).max())
big=[(c,gpu_drawn(c,i)) for i,c in enumerate(BIG)]
precompile([l for c,t in big for w in (True,False) for l in launches(c,t,wide=w)])
for c,t in big:
    run_on(c,t); got=t['out'].clone(); t['out'].fill_(torch.nan); run_on(c,t,False)
    off=off_rows(got,t['out'],c.head_dim); say('big','WRONG' if not off<=2e-2 else 'ok',f'{off:.2e}',str(c)[:150])
say('time',time.time()-t0)
# 2. speed
def causal_flops(c):
    return sum(4*c.heads*c.head_dim*(n*p+n*(n+1)/2) for n,p in zip(c.tokens,c.past))
def timed(c,ts,make):
    calls=[bind(l,t,c) for t in ts for l in make(t)]
    return replayed(calls)()/len(ts)*1e6
E=dict(head_dim=128,kv_heads=8,block_size=32)
CASES={
 '8x1024':Prompts((1024,)*8,(0,)*8,**E),
 '1x128':Prompts((128,),(0,),**E),
 '1x1024':Prompts((1024,),(0,),**E),
 '1x8192':Prompts((8192,),(0,),**E),
 '32x256':Prompts((256,)*32,(0,)*32,**E),
 '2048 behind 14336':Prompts((2048,),(14336,),**E),
 '7x1024+200 of 1100':Prompts((1024,)*7+(1,)*200,(0,)*7+(1099,)*200,**E),
 '1x1024+200 of 1100':Prompts((1024,)+(1,)*200,(0,)+(1099,)*200,**E),
 '200 of 1100':Prompts((1,)*200,(1099,)*200,**E),
 '8x1024 hd64':Prompts((1024,)*8,(0,)*8,head_dim=64,kv_heads=8,block_size=32),
 '8x1024 hd256':Prompts((1024,)*8,(0,)*8,head_dim=256,group=2,kv_heads=4,block_size=32),
}
which=sys.argv[1:]
for name,c in CASES.items():
    ts=[gpu_drawn(c,i) for i in range(3)]
    fl=causal_flops(c)
    row={}
    variants=[128] if c.head_dim==128 else [128,192] if c.head_dim==64 else [64]
    if name in ('8x1024','1x8192','7x1024+200 of 1100','32x256'): variants=[128,64,96 if c.block_size==32 else 128,160]
    for k in variants:
        cc=dataclasses.replace(c,keys=k)
        def make(t,cc=cc):
            return launches(cc,t)[1:]
        for t in ts: bind(launches(cc,t)[0],t,cc)(torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
        row[f'keys {k}']=timed(cc,ts,make)
        if name=='8x1024' and k==128:
            row['plan']=timed(cc,ts,lambda t:launches(cc,t)[:1])
            for v in ('pp','noexp','nosoft','reg240'):
                l=launches(cc,ts[0])[1]
                def vmake(t,v=v):
                    l=launches(cc,t)[1]
                    return [dataclasses.replace(l,kernel=dataclasses.replace(l.kernel,source=f'wide_attention_{v}.cu'))]
                row[v]=timed(cc,ts,vmake)
    if c.head_dim<=128 and ('8x1024'==name or '200' in name or name=='1x128'): row['mma']=timed(c,ts,lambda t:launches(c,t,wide=False))
    if '200' not in name and 'behind' not in name:
        try:
            qs=[(t['q'].view(-1,c.heads,c.head_dim),*(torch.randn(sum(c.tokens),c.kv_heads,c.head_dim,device='cuda',dtype=torch.bfloat16) for _ in range(2)),t['query_starts']) for t in ts]
            def flash():
                for q,k,v,s in qs: torch.ops.aten._flash_attention_forward(q,k,v,s,s,max(c.tokens),max(c.tokens),0.0,True,False,scale=c.head_dim**-0.5)
            flash(); torch.cuda.synchronize()
            e=[torch.cuda.Event(enable_timing=True) for _ in range(2)]; found=[]
            for _ in range(5):
                e[0].record(); flash(); e[1].record(); e[1].synchronize(); found.append(e[0].elapsed_time(e[1])/3*1e3)
            row['torch flash']=sorted(found)[2]
        except Exception as x: say('flash',x)
    say(name,{k:(round(v,1),f'{fl/v/1e6:.0f} TF') for k,v in row.items()})
    del ts
say('time',time.time()-t0)
