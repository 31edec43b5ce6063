"Exported files: run by onnxruntime or PyTorch alone, they predict what the learner predicts, or there is no file."
import json
import sys
from pathlib import Path

import ltrl_fastai
import numpy as np
import PIL.Image
import pytest
import torch
from fastai.vision.all import Callback, Learner, nn, noop
from ltrl_fastai.deploy import export as module
from ltrl_fastai.deploy.export import export_model, read_exported
from ltrl_fastai.deploy.model_files import load_classifier
from ltrl_fastai.cli.main import app
from ltrl_fastai.experiments.settings import RunSettings
from ltrl_fastai.methods.posthoc import LogitAdjustment
from ltrl_fastai.methods.ride import GatedExperts
from typer.testing import CliRunner

suffixes = dict(onnx='.onnx', torch='.pt2', torchscript='.pt')
every_format = pytest.mark.parametrize('format', suffixes)


def needs_packages(format):
    if format == 'onnx':
        for name in ('onnx', 'onnxruntime', 'onnxscript'): pytest.importorskip(name)


def run_alone(file, images):
    "Output of a file for images `(N, H, W, 3)`, by the format's own package"
    if file.suffix == '.onnx':
        import onnxruntime
        session = onnxruntime.InferenceSession(file)
        return torch.tensor(session.run(None, {session.get_inputs()[0].name: images})[0])
    net = torch.export.load(file).module() if file.suffix == '.pt2' else torch.jit.load(file)
    with torch.no_grad(): return net(torch.from_numpy(images))


def image_files(learn, folder, sizes):
    "Files of random images of these widths and heights"
    rng = np.random.default_rng(1)
    files = [folder/f'{i}.png' for i in range(len(sizes))]
    for file, (w, h) in zip(files, sizes):
        coarse = PIL.Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize((w, h)).save(file)
    return [str(o) for o in files]


def logits_of(learn, files):
    dl = learn.dls.test_dl(files, num_workers=0)
    with learn.no_bar(): return learn.get_preds(dl=dl, act=noop)[0]


@pytest.fixture
def plain(digits_model):
    return load_classifier(digits_model[1], device='cpu')


@pytest.fixture
def adjusted(plain):
    plain.add_cb(LogitAdjustment(plain.facts['class_counts'], tau=1.5))
    return plain


@pytest.fixture
def experts(digits_model):
    "RIDE's experts, untrained"
    return RunSettings(str(digits_model[0]), net='resnet8', epochs=1, method='ride').learner()


@pytest.fixture
def gated(experts):
    "RIDE's experts with gates that ask for different numbers of them"
    torch.manual_seed(0)
    experts.model = GatedExperts(experts.model.eval())
    gate_bias = experts.model.gates[0].out.bias
    files = [str(o) for o, _ in experts.dls.train.dataset.items[:40]]
    for bias in np.linspace(-3, 3, 61):
        gate_bias.data.fill_(float(bias))
        experts.model.asked.zero_()
        logits_of(experts, files)
        if (experts.model.asked > 0).sum() > 1: return experts
    pytest.fail('no bias makes the gates decide differently')


# an adjustment of logits is the same layer for all formats
exported = [(kind, format) for kind in ('plain', 'adjusted', 'experts', 'gated') for format in suffixes
            if kind != 'adjusted' or format == 'torchscript']


@pytest.mark.parametrize('kind,format', [
    pytest.param(*o, marks=[pytest.mark.slow] if o[0] == 'experts' else []) for o in exported])
def test_it_predicts_as_the_learner_does(kind, format, request, tmp_path):
    "With any number of images, and as probabilities or logits"
    needs_packages(format)
    learn = request.getfixturevalue(kind)
    file = tmp_path/f'a{suffixes[format]}'
    as_logits = kind != 'plain'
    told = export_model(learn, file, logits=as_logits)
    size = told['input']['size']
    files = image_files(learn, tmp_path, [(size, size)]*5)
    images = np.stack([np.asarray(PIL.Image.open(o)) for o in files])
    expected = logits_of(learn, files)
    if not as_logits: expected = learn.calibration.probabilities(expected)
    assert told['output'] == dict(name='logits' if as_logits else 'probabilities', type='float32', shape=['N', 7])
    for n in (1, 2, 5):
        torch.testing.assert_close(run_alone(file, images[:n]), expected[:n], rtol=1e-3, atol=1e-3)
    assert expected.std(0).max() > 1e-3, 'all images are predicted alike'


@every_format
def test_priors_and_half_precision(format, plain, tmp_path):
    needs_packages(format)
    images = np.random.default_rng(0).integers(0, 256, (3, 24, 24, 3), dtype=np.uint8)
    files = [str(tmp_path/f'{i}.png') for i in range(3)]
    for file, image in zip(files, images): PIL.Image.fromarray(image).save(file)
    logits = logits_of(plain, files)
    half, single = tmp_path/f'half{suffixes[format]}', tmp_path/f'single{suffixes[format]}'
    assert plain.facts['input']['size'] == 24
    frequencies = [5, 0, 1, 1, 1, 1, 1]
    told = export_model(plain, single, prior=frequencies)
    found = run_alone(single, images)
    assert told['prior'] == frequencies and (found[:, 1] == 0).all()
    torch.testing.assert_close(found, plain.calibration.probabilities(logits, frequencies), rtol=1e-3, atol=1e-4)
    export_model(plain, half, prior='balanced', half=True)
    found = run_alone(half, images)
    assert found.dtype == torch.float32 and half.stat().st_size < .7*single.stat().st_size
    torch.testing.assert_close(found, plain.calibration.probabilities(logits, 'balanced'), rtol=.1, atol=.02)


@every_format
def test_a_file_describes_itself(format, plain, tmp_path):
    "Also without the folder that it was written to, and without paths of the machine that wrote it"
    needs_packages(format)
    file = tmp_path/f'a{suffixes[format]}'
    told = export_model(plain, file, prior='train')
    beside = json.loads((tmp_path/f'{file.name}.json').read_text())
    moved = file.rename(tmp_path/f'b{suffixes[format]}')
    read = read_exported(moved)
    assert beside == told and read == {k: told[k] for k in read}
    assert set(told)-set(read) == {'largest_difference', 'tolerance'}
    assert read['classes'] == list(plain.dls.vocab) and read['prior'] == 'train' and read['is_calibrated']
    assert read['temperature'] == plain.calibration.temperature
    if format == 'torchscript': return  # its debugging information can't be left out
    for of in (torch, ltrl_fastai): assert str(Path(of.__file__).parent).encode() not in moved.read_bytes()


@pytest.mark.parametrize('resize', ['crop', 'squish'])
def test_images_are_resized_as_the_description_says(resize, digits_model, tmp_path):
    "Photographs of any shape, by Pillow and NumPy alone"
    learn = RunSettings(str(digits_model[0]), net='resnet8', epochs=1, size=40, resize=resize).learner()
    rule = export_model(learn, tmp_path/'a.pt', logits=True)['input']
    sizes = [(90, 61), (33, 70), (40, 40), (17, 19)]
    files = image_files(learn, tmp_path, sizes)
    images = []
    for file, (w, h) in zip(files, sizes):
        image = PIL.Image.open(file)
        if resize == 'crop':
            side = round(min(w, h)*rule['crop'])
            corner = (w-side)//2, (h-side)//2
            image = image.crop((*corner, corner[0]+side, corner[1]+side))
        images.append(np.asarray(image.resize((rule['size'],)*2, PIL.Image.Resampling.BILINEAR)))
    assert (rule['crop'] is None) == (resize == 'squish')
    found = run_alone(tmp_path/'a.pt', np.stack(images))
    torch.testing.assert_close(found, logits_of(learn, files), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@every_format
@pytest.mark.parametrize('net', ['efficientnet-lite0', 'resnet18', 'mobilenetv3_small_050'])
def test_photograph_nets(net, format, digits_model, tmp_path):
    needs_packages(format)
    from ltrl_fastai.methods.finetuning import finetuned_net
    if net == 'efficientnet-lite0': pytest.importorskip('efficientnet_lite_pytorch')
    if net.startswith('mobile'): pytest.importorskip('timm')
    settings = RunSettings(str(digits_model[0]), net='resnet8', epochs=1, size=96)
    learn = settings.learner()
    learn.model = finetuned_net(net, 7, weights=None)
    told = export_model(learn, tmp_path/f'a{suffixes[format]}', half=format != 'torch')
    assert told['input']['shape'] == ['N', 96, 96, 3] and told['largest_difference'] <= told['tolerance']


@every_format
def test_a_file_that_predicts_otherwise_is_not_kept(format, plain, tmp_path, monkeypatch):
    needs_packages(format)
    right = module.serving_net

    def slightly_wrong(*args):
        net = right(*args)
        net.shift[0] += .01
        return net
    monkeypatch.setattr(module, 'serving_net', slightly_wrong)
    file = tmp_path/f'a{suffixes[format]}'
    file.write_text('an older file')
    with pytest.raises(ValueError, match='predicts otherwise.*Try another format'):
        export_model(plain, file, force=True)
    assert [o.name for o in tmp_path.iterdir()] == [file.name] and file.read_text() == 'an older file'


class Sharper(Callback):
    "Changes predictions where the exporter can't see it"
    def after_pred(self): self.learn.pred = 1.1*self.pred


def test_unknown_callbacks_are_noticed(plain, tmp_path):
    plain.add_cb(Sharper())
    with pytest.raises(ValueError, match='predicts otherwise'): export_model(plain, tmp_path/'a.pt')
    assert not list(tmp_path.iterdir())


class Undecided(nn.Module):
    "A net whose way depends on its input"
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x): return self.net(x) if x.mean() > 0 else -self.net(x)


def test_a_net_that_cannot_be_converted(plain, tmp_path, capfd):
    plain.model = Undecided(plain.model).eval()
    with pytest.raises(ValueError, match="torch: this network can't be converted"):
        export_model(plain, tmp_path/'a.pt2')
    assert not list(tmp_path.iterdir()) and not ''.join(capfd.readouterr()).strip()


def test_the_learner_is_not_changed(adjusted, tmp_path):
    model, before = adjusted.model, {k: o.clone() for k, o in adjusted.model.state_dict().items()}
    cbs = sorted(o.name for o in adjusted.cbs)
    export_model(adjusted, tmp_path/'a.pt', half=True)
    assert adjusted.model is model and sorted(o.name for o in adjusted.cbs) == cbs
    for k, o in model.state_dict().items(): assert torch.equal(o, before[k]) and o.dtype == before[k].dtype


def test_what_is_refused_before_any_work(plain, dls, mlp, tmp_path, monkeypatch):
    def refused(match, file='a.pt', error=ValueError, learn=plain, **kwargs):
        with pytest.raises(error, match=match): export_model(learn, tmp_path/file, **kwargs)
    (tmp_path/'folder.pt').mkdir()
    (tmp_path/'old.pt.json').touch()
    refused('is a folder', 'folder.pt', IsADirectoryError)
    refused('there already.*--force', 'old.pt', FileExistsError)
    refused('ends in .onnx, since the format is onnx', format='onnx')
    refused('ends in .onnx, .pt2, .pt', 'model')
    refused("Did you mean 'torchscript'", format='torchscrip')
    refused('torchscript has none', opset=18)
    refused('Leave out the prior', prior='train', logits=True)
    refused("Did you mean 'balanced'", prior='ballanced')
    refused('each of 7 classes, got 2', prior=[1, 1])
    refused('model of image files', learn=Learner(dls, mlp(), loss_func=nn.CrossEntropyLoss()))
    plain.calibration = None
    refused('not calibrated', prior='train')
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    refused(r"onnxruntime is not installed: `pip install 'ltrl_fastai\[export\]'`", 'a.onnx', ImportError)
    assert sorted(o.name for o in tmp_path.iterdir()) == ['folder.pt', 'old.pt.json']


@pytest.mark.slow
def test_opset(plain, tmp_path):
    "It is the one that was asked for, or an error"
    onnx = pytest.importorskip('onnx')
    needs_packages('onnx')
    export_model(plain, tmp_path/'a.onnx', opset=20)
    assert [o.version for o in onnx.load(tmp_path/'a.onnx').opset_import if not o.domain] == [20]
    with pytest.raises(ValueError, match='opset 13'): export_model(plain, tmp_path/'b.onnx', opset=13)
    assert not (tmp_path/'b.onnx').exists()


def test_files_that_are_no_exported_models(tmp_path):
    with pytest.raises(FileNotFoundError): read_exported(tmp_path/'a.pt')
    with pytest.raises(ValueError, match='ends in'): read_exported(Path(__file__))
    (tmp_path/'a.pt2').write_bytes(b'damaged')
    with pytest.raises(ValueError, match="can't be read as torch"): read_exported(tmp_path/'a.pt2')
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), str(tmp_path/'b.pt'))
    with pytest.raises(ValueError, match='no description'): read_exported(tmp_path/'b.pt')


def ltrl(*args): return CliRunner().invoke(app, ['export', *map(str, args)])


def test_command(digits_model, tmp_path):
    _, model = digits_model
    prior = tmp_path/'prior.csv'
    vocab = json.loads((model/'model.json').read_text())['classes']
    prior.write_text('\n'.join(f'{o},{i+1}' for i, o in enumerate(vocab)))
    file = tmp_path/'out/a.pt'
    first = ltrl(model, '--out', file, '--prior', prior)
    assert first.exit_code == 0 and str(file) in first.output and 'Warning' not in first.output, first.output
    assert read_exported(file)['prior'] == list(range(1, len(vocab)+1))
    again = ltrl(model, '--out', file)
    assert again.exit_code == 2 and '--force' in again.output
    replaced = ltrl(model, '--out', file, '--force', '--logits')
    assert replaced.exit_code == 0 and read_exported(file)['output']['name'] == 'logits'


@pytest.mark.parametrize('args, said', [
    (['--out', 'blocked/a.pt'], 'blocked'),
    (['--format', 'torch', '--out', 'a.pt'], 'ends in .pt2'),
    (['--format', 'onx'], "Did you mean 'onnx'"),
    (['--prior', 'none.csv'], 'none.csv is not there')])
def test_errors_of_the_command(args, said, digits_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('blocked').write_text('a file, where a folder is needed')
    r = ltrl(digits_model[1], *args)
    assert r.exit_code == 2 and r.output.startswith('Error: ') and said in r.output
    assert r.exception is None or isinstance(r.exception, SystemExit)
    assert [o.name for o in tmp_path.iterdir()] == ['blocked']


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), PermissionError(13, 'Permission denied')])
def test_an_output_that_can_not_be_written(error, digits_model, tmp_path, monkeypatch):
    def write(*_): raise error
    monkeypatch.setattr(Path, 'touch', write)
    r = ltrl(digits_model[1], '--out', tmp_path/'a.pt')
    assert r.exit_code == 2 and f"a.pt can't be written ({error.strerror}). Choose another place." in r.output
    assert r.output.startswith('Error: --out: ') and not [*tmp_path.iterdir()]


def test_pickles_need_trust(digits_model, tmp_path):
    pickle = digits_model[1]/'model.pkl'
    refused = ltrl(pickle, '--out', tmp_path/'a.pt')
    assert refused.exit_code == 2 and '--trust' in refused.output and not list(tmp_path.iterdir())
    r = ltrl(pickle, '--out', tmp_path/'a.pt', '--trust')
    assert r.exit_code == 0 and (tmp_path/'a.pt').exists()


@pytest.mark.parametrize('format', ['torch', 'torchscript'])
def test_a_full_disk(format, digits_model, tmp_path, monkeypatch):
    "Also where PyTorch would end the process: nothing is left, and the error is raised"
    def write(*_): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Path, 'write_bytes', write)
    learn = load_classifier(digits_model[1], device='cpu')
    file = tmp_path/f'model{module._suffixes[format]}'
    with pytest.raises(OSError, match='No space'): export_model(learn, file, format)
    assert not [*tmp_path.iterdir()]
