def write(run, trust_code): return run
