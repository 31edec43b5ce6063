"What several processes learn is what one learns that sees all their batches."
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip('accelerate')
import ranks_worker as worker

here = Path(__file__).parent


@pytest.fixture(scope='module', params=[2, 3])
def trained(request, tmp_path_factory):
    "What `world` processes have learned"
    folder = tmp_path_factory.mktemp(f'ranks{request.param}')
    r = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={request.param}', str(here/'ranks_worker.py'), str(folder)],
                       capture_output=True, text=True, timeout=600, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert r.returncode == 0, r.stderr[-5000:]
    return request.param, folder


@pytest.mark.parametrize('name', worker.variants)
def test_ranks_learn_what_one_process_learns(trained, name):
    world, folder = trained
    want = worker.fit(worker.learner(name, world))
    for rank in range(world):
        got = torch.load(folder/f'{name}-{rank}.pt', weights_only=True)
        assert got.keys() == want.keys()
        for k, v in want.items(): torch.testing.assert_close(got[k], v, rtol=1e-5, atol=1e-6, equal_nan=True, check_dtype=False, msg=lambda m, k=k: f'{k}: {m}')
    assert want['history.review_loss'][1:].gt(0).all()
