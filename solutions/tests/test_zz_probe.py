import sys, pytest, time
from solutions.tests.test_interrupts import *
@pytest.mark.parametrize("name", list(ENGINES))
def test_probe(name, start):
    n = 60 if "parallel" in name else 250
    t=time.time()
    reached, wrong = places(name, start, n)
    print(f"\n{name}: {len(reached)} ok, {len(wrong)} wrong, {time.time()-t:.0f} s")
    for k,v in list(wrong.items())[:8]: print("   ",k,v)
