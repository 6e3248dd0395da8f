exec(open('gpu_study/make.py').read().split("def spec_of")[0])
for k,v in texts.items():
    if k!='base': (src/f'wide_attention_{k}.cu').write_text(v)
