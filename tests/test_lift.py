"Adapters against formulas written out, what they leave alone, files of weights, and LIFT as a method and a command."
from copy import deepcopy
from importlib.util import find_spec

import numpy as np
import PIL.Image
import pytest
import timm
import torch
import torchvision
from fastai.basics import Callback, CancelFitException, Learner, load_learner, set_seed
from fastai.vision.all import CrossEntropyLossFlat, F, SGD, nn
from ltrl_fastai.all import (Checkpoint, FiveCrops, InitHead, LogitAdjustment, ReflectiveLearning, adapt_vit,
                             digits_lt, export_model, finetuned_net, five_crops, lift_net, load_classifier, methods,
                             parameter_counts)
from ltrl_fastai.cli.main import app
from ltrl_fastai.experiments.recipes import later_recipes, matching, recipe, recipes
from ltrl_fastai.experiments.training import RunSettings, train_run
from ltrl_fastai.methods.adapters import AdaptFormer, LowRankQueryValue, Prompted, find_vit
from ltrl_fastai.methods.catalogue import method_with
from ltrl_fastai.methods.heads import head_of
from ltrl_fastai.methods.lift import class_words, text_features
from ltrl_fastai.methods.nets import CosineHead
from ltrl_fastai.reflective.features import find_head
from safetensors.torch import save_file
from torchvision.models import _api
from typer.testing import CliRunner

zero_at_first = ('adaptformer', 'lora', 'bias')
adapters = (*zero_at_first, 'vpt-deep', 'vpt-shallow')
libraries = ('torchvision', 'timm', 'open_clip')
shape = dict(layers=3, heads=2, dim=8)
clip_config = dict(embed_dim=6, vision_cfg=dict(image_size=16, layers=3, width=8, head_width=4, patch_size=8),
                   text_cfg=dict(context_length=16, vocab_size=49408, width=8, heads=2, layers=2))


def torchvision_vit(num_classes=1000, **kwargs):
    return torchvision.models.VisionTransformer(image_size=16, patch_size=8, num_layers=3, num_heads=2, hidden_dim=8,
                                                mlp_dim=32, num_classes=num_classes)


torchvision_vit.__module__ = 'torchvision.models.vision_transformer'  # torchvision lists by module


def timm_vit(**kwargs):
    return timm.models.VisionTransformer(img_size=16, patch_size=8, depth=3, num_heads=2, embed_dim=8, **kwargs)


def drawn(net, seed=0, std=.3):
    "The net in double precision, with all that is trained drawn at random: no zeros, no ones"
    torch.manual_seed(seed)
    for p in net.parameters():
        if p.requires_grad: nn.init.normal_(p, std=std)
    return net.double().eval()


def made(library, n_classes=5, **kwargs):
    "A small transformer with a head"
    if library == 'torchvision': return drawn(torchvision_vit(n_classes))
    if library == 'timm': return drawn(timm_vit(num_classes=n_classes, **kwargs))
    open_clip = pytest.importorskip('open_clip')
    from ltrl_fastai.methods.finetuning import ClipNet
    return drawn(ClipNet(open_clip.CLIP(**clip_config), n_classes))


where = dict(torchvision=('encoder.layers', 'encoder.ln'), timm=('blocks', 'norm'),
             open_clip=('visual.transformer.resblocks', 'visual.ln_post'))


def input_of(net, part, x):
    "What a submodule, or the one of a name, gets when the net sees `x`"
    seen = []
    module = net.get_submodule(part) if isinstance(part, str) else part
    handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    net(x)
    handle.remove()
    return seen[0]


def norm(layer, x):
    mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x-mean)/(var+layer.eps).sqrt()*layer.weight+layer.bias


def linear(layer, x): return x@layer.weight.T+layer.bias


def gelu(x): return x*(1+torch.erf(x/2**.5))/2


def naive_layer(library, layer, x, lora=None, adaptformer=None):
    "A transformer layer of any of the libraries, written out, with adapters"
    if library == 'timm':
        norms, attention, (first, last) = (layer.norm1, layer.norm2), layer.attn, (layer.mlp.fc1, layer.mlp.fc2)
        weight, bias, projection = attention.qkv.weight, attention.qkv.bias, attention.proj
    else:
        attention = layer.self_attention if library == 'torchvision' else layer.attn
        norms, (first, last) = (layer.ln_1, layer.ln_2), [m for m in layer.mlp if isinstance(m, nn.Linear)]
        weight, bias, projection = attention.in_proj_weight, attention.in_proj_bias, attention.out_proj
    y = norm(norms[0], x)
    q, k, v = (y@w.T+b for w, b in zip(weight.chunk(3), bias.chunk(3)))
    if lora is not None:
        size = len(lora.down[0])
        q = q+y@lora.down[0].T@lora.up[0].T/size
        v = v+y@lora.down[1].T@lora.up[1].T/size
    heads = [torch.softmax(a@b.transpose(1, 2)/4**.5, -1)@c for a, b, c in zip(*(o.split(4, -1) for o in (q, k, v)))]
    x = x+linear(projection, torch.cat(heads, -1))
    added = 0
    if adaptformer is not None:
        a = adaptformer
        added = a.scale*linear(a.up, linear(a.down, norm(a.norm, x)).clamp(min=0))
    return x+linear(last, gelu(linear(first, norm(norms[1], x))))+added


@pytest.mark.parametrize('layers', [None, 2, (0, 2), (1, 2)])
@pytest.mark.parametrize('adapter', ['adaptformer', 'lora', 'vpt-deep', 'vpt-shallow'])
@pytest.mark.parametrize('library', libraries)
def test_an_adapted_net_is_what_its_formula_says(library, adapter, layers):
    if adapter == 'vpt-shallow' and layers is not None: pytest.skip('it has no layers to choose')
    plain = made(library)
    path, last = where[library]
    x = torch.randn(2, 3, 16, 16, dtype=torch.double)
    blocks = list(plain.get_submodule(path))
    tokens = input_of(plain, blocks[0], x)
    net = drawn(adapt_vit(deepcopy(plain), adapter, layers, size=3), seed=1)
    first, end = {None: (0, 3), 2: (1, 3)}.get(layers, layers)
    added = iter([m for m in net.modules() if isinstance(m, (AdaptFormer, LowRankQueryValue, Prompted))])
    n = tokens.shape[1]
    for i, block in enumerate(blocks):
        kwargs = {}
        adapted = first <= i < end if adapter != 'vpt-shallow' else i == 0
        if adapted and adapter == 'adaptformer': kwargs['adaptformer'] = next(added)
        if adapted and adapter == 'lora': kwargs['lora'] = next(added)
        if adapted and adapter.startswith('vpt'):
            tokens = torch.cat([tokens[:, :n], next(added).prompts.expand(2, -1, -1)], 1)
        tokens = naive_layer(library, block, tokens, **kwargs)
    assert next(added, None) is None
    with torch.enable_grad(): torch.testing.assert_close(input_of(net, last, x), tokens[:, :n], rtol=0, atol=1e-10)
    with torch.no_grad(): torch.testing.assert_close(input_of(net, last, x), tokens[:, :n], rtol=0, atol=1e-10)


@pytest.mark.parametrize('adapter', adapters)
@pytest.mark.parametrize('library', libraries)
def test_the_start_and_what_is_trained(library, adapter):
    "The function is the pretrained one at first; adapters and head get gradients, and nothing else asks for them"
    plain = made(library)
    x = torch.randn(2, 3, 16, 16, dtype=torch.double)
    net = adapt_vit(deepcopy(plain), adapter, size=None if adapter == 'bias' else 4).double()
    assert torch.allclose(net(x), plain(x), rtol=0, atol=1e-12) == (adapter in zero_at_first)
    drawn(net, 2)(x).square().sum().backward()
    trained = {k for k, p in net.named_parameters() if p.requires_grad}
    assert {k for k, p in net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0} == trained
    kept = {k: v for k, v in plain.state_dict().items() if k not in trained}
    now = [*net.state_dict().values()]
    assert all(any(o.shape == v.shape and torch.equal(o, v) for o in now) for v in kept.values())
    r, d, c = 4, 8, 5  # size, width, classes; three layers
    expected = dict(adaptformer=3*(2*d*r+r+3*d+1), lora=3*4*d*r, **{'vpt-deep': 3*d*r, 'vpt-shallow': d*r},
                    bias=3*(2*d+3*d+d+4*d+d))
    counts = parameter_counts(net)
    assert counts['adapters'] == expected[adapter] and counts['head'] == (d+1)*c
    assert sum(counts.values()) == sum(p.numel() for p in net.parameters())
    assert parameter_counts(adapt_vit(deepcopy(plain), 'vpt-shallow'))['adapters'] == 10*d


def test_a_layer_scale_moves_behind_the_mlp_alone():
    plain = made('timm', init_values=.1)
    net = adapt_vit(deepcopy(plain)).double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.double)
    torch.testing.assert_close(net(x), plain(x), rtol=0, atol=1e-12)
    adapter = net.blocks[2].mlp.adapter
    nn.init.ones_(adapter.up.bias)
    moved = input_of(net, 'norm', x)-input_of(plain, 'norm', x)
    torch.testing.assert_close(moved, torch.ones_like(moved), rtol=0, atol=1e-12)  # not a tenth of it


def test_an_average_of_tokens_leaves_prompts_out():
    net = adapt_vit(made('timm', global_pool='avg'), 'vpt-shallow').double()
    assert input_of(net, 'norm', torch.randn(2, 3, 16, 16, dtype=torch.double)).shape == (2, 5, 8)


def digits_vit(seed=0):
    torch.manual_seed(seed)
    return timm.models.VisionTransformer(img_size=8, patch_size=4, in_chans=1, depth=2, num_heads=2, embed_dim=16,
                                         num_classes=10)


def digits_learner(cbs=None, method='lift', net=None, **kwargs):
    set_seed(0, reproducible=True)
    dls = digits_lt(device='cpu')
    return method_with(method, **kwargs).learner(dls, digits_vit() if net is None else net, cbs=cbs, opt_func=SGD,
                                                 wd=.1)


def fit(learn, epochs=2, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, .05, **kwargs)
    return learn


@pytest.mark.parametrize('adapter', adapters)
def test_a_fit_moves_what_is_trained_alone(adapter):
    learn = digits_learner(ReflectiveLearning(preset='v0.0.1', ks=True, kc=True), adapter=adapter)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    trained = {k for k, p in learn.model.named_parameters() if p.requires_grad}
    fit(learn)
    moved = {k for k, v in learn.model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == trained | {k for k in before if k.endswith('initialised')}
    assert isinstance(find_head(learn.model, n_out=10), CosineHead) and isinstance(head_of(learn.model)[1], CosineHead)
    assert learn.model.get_classifier().scale == 25.


def test_the_head_starts_at_class_means():
    learn = digits_learner()
    net = learn.model.eval()
    sums = torch.zeros(10, 16, dtype=torch.double)
    for x, y in learn.dls.train_ds: sums[int(y)] += net.net.forward_head(
        net.net.forward_features(learn.dls.valid.after_batch(x[None])), pre_logits=True)[0].detach().double()
    head = head_of(net)[1]
    fit(learn, 1, cbs=StopFirst())
    torch.testing.assert_close(head.weight.double(), F.normalize(sums, dim=1), rtol=0, atol=1e-5)


class StopFirst(Callback):
    "Ends a fit before its first step"
    order = 300
    def before_batch(self):
        if self.training: raise CancelFitException


def test_a_head_is_set_once(tmp_path):
    learn = fit(digits_learner())
    learn.path = tmp_path
    learn.save('trained')
    trained = head_of(learn.model)[1].weight.detach().clone()
    fit(learn, 1, cbs=StopFirst())
    assert torch.equal(head_of(learn.model)[1].weight, trained)
    other = digits_learner()
    other.path = tmp_path
    other.load('trained')
    fit(other, 1, cbs=StopFirst())
    assert torch.equal(head_of(other.model)[1].weight, trained)
    kept = digits_learner(init='none')
    random = head_of(kept.model)[1].weight.detach().clone()
    fit(kept, 1, cbs=StopFirst())
    assert torch.equal(head_of(kept.model)[1].weight, random)


def test_a_class_without_images_keeps_its_vector():
    learn = digits_learner()
    learn.remove_cb(InitHead)
    before = head_of(learn.model)[1].weight.detach().clone()
    targets = torch.as_tensor([int(y) for _, y in learn.dls.train_ds])
    items = [(x, y) for x, y in learn.dls.train_ds if int(y) != 9]
    assert len(items) < len(targets)
    cb = InitHead()
    cb.learn = learn
    import ltrl_fastai.methods.lift as lift
    means, n = lift.class_means(learn, 10)
    n[9] = 0
    real = lift.class_means
    try:
        lift.class_means = lambda *args: (means, n)
        cb.before_fit()
    finally: lift.class_means = real
    after = head_of(learn.model)[1].weight
    assert torch.equal(after[9], before[9]) and not torch.equal(after[0], before[0])


def test_an_interrupted_fit_goes_on_where_it_was(tmp_path):
    class Stop(Callback):
        order = 300
        def after_epoch(self):
            if self.epoch == 1: raise KeyboardInterrupt
    whole = fit(digits_learner(), 4)
    learn = digits_learner([Checkpoint(tmp_path/'fit.pt'), Stop()])
    with pytest.raises(KeyboardInterrupt): fit(learn, 4)
    again = fit(digits_learner(Checkpoint(tmp_path/'fit.pt')), 4)
    for (name, a), b in zip(whole.model.state_dict().items(), again.model.state_dict().values()):
        assert torch.equal(a, b), name


def test_export(tmp_path):
    learn = fit(digits_learner(ReflectiveLearning(), adapter='lora'))
    expected, _ = learn.get_preds()
    learn.export(tmp_path/'model.pkl')
    loaded = load_learner(tmp_path/'model.pkl')
    x = learn.dls.valid_ds
    got, _ = loaded.get_preds(dl=learn.dls.valid.new(x))
    torch.testing.assert_close(got, expected)


def test_five_crops_are_averaged_when_predicting():
    learn = fit(digits_learner())
    net, counts = learn.model.eval(), learn.dls.class_counts
    batches = [(net(x), torch.stack([net(o) for o in five_crops(x)]).mean(0)) for x, _ in learn.dls.valid]
    one, five = (torch.cat(o).detach() for o in zip(*batches))
    with learn.no_bar():
        got, y = learn.get_preds(act=lambda x: x)
        torch.testing.assert_close(got, five)
        assert not torch.allclose(one, five)
        loss = learn.validate()[0]
        assert loss == pytest.approx(F.cross_entropy(one+counts.float().log(), y).item(), rel=1e-4)
        learn.add_cb(LogitAdjustment(counts))
        got, _ = learn.get_preds(act=lambda x: x)
    torch.testing.assert_close(got, five-(counts/counts.sum()).log())


def test_crops_are_torchvisions():
    x = torch.rand(2, 3, 224, 224)
    large = F.interpolate(x, size=(248, 248), mode='bicubic')
    corners = [(0, 0), (0, 24), (24, 0), (24, 24), (12, 12)]
    for crop, (top, left) in zip(five_crops(x), corners):
        assert torch.equal(crop, large[:, :, top:top+224, left:left+224])
    with pytest.raises(ValueError, match='from 1 on'): five_crops(x, 0)


def test_small_images_are_enlarged():
    plain = made('torchvision').float()
    net = lift_net(deepcopy(plain)).eval()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(net(x), net(F.interpolate(x, size=(16, 16), mode='bicubic')))


# Files of weights, made by the libraries

def small_timm_vit(pretrained=False, **kwargs): return timm_vit()


@pytest.fixture
def small_nets(tmp_path, monkeypatch):
    "Small transformers under a name of each library, and a file of weights of each; open_clip only if installed"
    monkeypatch.setitem(_api.BUILTIN_MODELS, 'vit_test', torchvision_vit)
    monkeypatch.setitem(timm.models._registry._model_entrypoints, 'vit_timm_test', small_timm_vit)
    torch.manual_seed(3)
    nets = dict(vit_test=torchvision_vit(7), vit_timm_test=timm_vit(num_classes=7))
    files = dict(vit_test=tmp_path/'vit.pth', vit_timm_test=tmp_path/'vit.safetensors')
    torch.save(nets['vit_test'].state_dict(), files['vit_test'])
    save_file(nets['vit_timm_test'].state_dict(), files['vit_timm_test'])
    if not find_spec('open_clip'): return nets, files
    from open_clip import CLIP, factory
    monkeypatch.setitem(factory._MODEL_CONFIGS, 'ViT-test', clip_config)
    nets['ViT-test'] = CLIP(**clip_config)
    files['ViT-test'] = tmp_path/'clip.pt'
    state = {f'module.{k}': v for k, v in nets['ViT-test'].state_dict().items()}  # as open_clip trains on several GPUs
    torch.save({'epoch': 3, 'state_dict': state}, files['ViT-test'])
    return nets, files


def test_files_of_three_libraries(small_nets):
    nets, files = small_nets
    for name, source in nets.items():
        net = finetuned_net(name, 5, files[name])
        vit = find_vit(net)[0]
        theirs = source.visual if name == 'ViT-test' else source
        state = theirs.state_dict()
        for key, value in vit.state_dict().items():
            if not key.startswith('head'): assert torch.equal(value, state[key]), (name, key)
        assert head_of(net)[1].out_features == 5
        lift = lift_net(net).eval()
        assert lift(torch.randn(2, 3, 16, 16)).shape == (2, 5)
        other = next(o for o in files if o != name)
        with pytest.raises(ValueError, match=f'weights of another net than {name}'):
            finetuned_net(name, 5, files[other])


def test_a_net_that_was_published_without_a_head(monkeypatch, tmp_path):
    "Some nets of timm, such as DINOv2, end with features"
    monkeypatch.setitem(timm.models._registry._model_entrypoints, 'vit_bare', lambda **kwargs: timm_vit(num_classes=0))
    bare = timm_vit(num_classes=0).eval()
    save_file(bare.state_dict(), tmp_path/'bare.safetensors')
    net = lift_net(finetuned_net('vit_bare', 5, tmp_path/'bare.safetensors')).eval()
    x = torch.randn(2, 3, 16, 16)
    head = head_of(net)[1]
    with torch.no_grad(): torch.testing.assert_close(net(x), head(bare(x)))
    assert head.out_features == 5


def test_a_file_of_other_shapes(small_nets, tmp_path):
    torch.save(torchvision.models.VisionTransformer(16, 8, 3, 2, 12, 32).state_dict(), tmp_path/'wide.pth')
    with pytest.raises(ValueError, match=r'has shape \(1, 1, 12\) instead of \(1, 1, 8\)'):
        finetuned_net('vit_test', 5, tmp_path/'wide.pth')


def test_pixels_of_clip(small_nets):
    "Images normalised for ImageNet reach CLIP's tower normalised for CLIP"
    nets, files = small_nets
    if 'ViT-test' not in nets: pytest.skip('open_clip is not installed')
    import open_clip
    from torchvision.transforms.functional import normalize
    net = finetuned_net('ViT-test', 5, files['ViT-test']).eval()
    pixels = torch.rand(2, 3, 16, 16)
    seen = input_of(net, 'net.visual', normalize(pixels, (.485, .456, .406), (.229, .224, .225)))
    expected = normalize(pixels, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)


def test_text_features(small_nets):
    "The head's start classifies as CLIP does without any training, up to the map that takes texts to image features"
    nets, files = small_nets
    if 'ViT-test' not in nets: pytest.skip('open_clip is not installed')
    import open_clip
    clip, names = nets['ViT-test'], ['n01440764 tench', 'Fruit/Red_apple', 'cat']
    net = lift_net(finetuned_net('ViT-test', 3, files['ViT-test']))
    tokens = open_clip.get_tokenizer('ViT-test')([f'a photo of a {o}.' for o in ('tench', 'Fruit Red apple', 'cat')])
    with torch.no_grad(): text = F.normalize(clip.eval().encode_text(tokens), dim=1)
    expected = F.normalize(text@clip.visual.proj.detach().T, dim=1)
    got = text_features(net, names)
    torch.testing.assert_close(got, expected)
    learn = Learner(digits_lt(device='cpu'), net, loss_func=CrossEntropyLossFlat())
    learn.dls.vocab = names
    cb = InitHead()
    cb.learn = learn
    cb.before_fit()
    torch.testing.assert_close(head_of(net)[1].weight.detach(), expected)
    assert not any('text_tower' in k or 'token_embedding' in k for k in net.state_dict())
    assert all(getattr(m, 'text_tower', None) is None for m in deepcopy(net).modules())


def test_texts_need_a_text_tower_and_words():
    with pytest.raises(ValueError, match="'text' needs the text tower"): fit(digits_learner(init='text'), 1)
    with pytest.raises(ValueError, match="Did you mean 'text'"): InitHead('texts')
    with pytest.raises(ValueError, match='made by lift_net'):
        fit(Learner(digits_lt(device='cpu'), digits_vit(), loss_func=CrossEntropyLossFlat(), cbs=InitHead()), 1)
    words = {'n02119789 kit fox': 'kit fox', 'bed_room': 'bed room', 'A/b-c': 'A b c', '7': '7'}
    assert {o: class_words(o) for o in words} == words


def test_without_the_extra(monkeypatch):
    from ltrl_fastai.methods import finetuning
    monkeypatch.setattr(finetuning, '_open_clip', lambda: None)
    with pytest.raises(ImportError, match=r"pip install 'ltrl_fastai\[clip\]'"): finetuned_net('ViT-B-16-quickgelu', 5)


def test_unknown_names():
    pytest.importorskip('open_clip')
    with pytest.raises(ValueError, match="Did you mean 'ViT-B-16'"): finetuned_net('ViT-B-61', 5, None)
    with pytest.raises(ValueError, match='vision transformer of its own'): finetuned_net('ViT-B-16-SigLIP', 5, None)


# As a method and a command

@pytest.fixture
def photographs(tmp_path):
    "A folder of small photographs of three classes"
    rng = np.random.default_rng(0)
    for i, (name, n) in enumerate(dict(red=12, green=6, blue=4).items()):
        (tmp_path/'photos'/name).mkdir(parents=True)
        for j in range(n):
            pixels = rng.integers(0, 80, (24, 24, 3))
            pixels[..., i] += 150
            PIL.Image.fromarray(pixels.astype(np.uint8)).save(tmp_path/'photos'/name/f'{j}.png')
    return tmp_path/'photos'


def lift_settings(folder, net, file, **kwargs):
    return RunSettings(str(folder), method='lift', net=net, weights=str(file), size=16, epochs=2, bs=8, **kwargs)


def test_settings(photographs):
    s = RunSettings(dataset=str(photographs), method='lift', size=224)
    assert (s.net, s.epochs, s.lr, s.bs, s.schedule, s.optimizer, s.body_lr) == \
        ('vit_b_16', 10, .01, 128, 'cosine', 'sgd', None)
    assert s.pretrained and not s.nesterov and s.wd == 5e-4
    with pytest.raises(ValueError, match='Leave out --from-scratch'): RunSettings(method='lift', pretrained=False)
    with pytest.raises(ValueError, match='made of vectors'): RunSettings(dataset='photos-lt', method='lift')


def test_a_run_is_saved_and_loaded(small_nets, photographs, tmp_path):
    "For each library: trained, saved, built again from its facts without the file of weights, and the same"
    nets, files = small_nets
    for name in nets:
        settings = lift_settings(photographs, name, files[name], reflective={})
        out = tmp_path/f'model-{name}'
        res, _ = train_run(settings, bar=False, model=out)
        assert res['valid_accuracy']['all'] is not None
        pickled, built = load_classifier(out/'model.pkl', trust=True), load_classifier(out)
        assert all(torch.equal(a, b) for a, b in zip(pickled.model.state_dict().values(),
                                                     built.model.state_dict().values()))
        assert head_of(built.model)[1].initialised
        assert (out/'model.safetensors').stat().st_size < 200_000  # the text tower has 400,000 numbers


@pytest.mark.parametrize('adapter,suffix', [
    pytest.param('adaptformer', '.onnx', marks=pytest.mark.slow), ('lora', '.pt')])
def test_an_exported_model_averages_crops_too(small_nets, photographs, tmp_path, adapter, suffix):
    "`export_model` keeps a file only if it predicts what the learner predicts"
    settings = lift_settings(photographs, 'vit_test', small_nets[1]['vit_test'], method_args=dict(adapter=adapter))
    train_run(settings, bar=False, model=tmp_path/'model')
    learn = load_classifier(tmp_path/'model')
    assert learn._grab_cbs(FiveCrops)
    assert export_model(learn, tmp_path/f'model{suffix}')['largest_difference'] < 1e-3


def test_the_command(small_nets, photographs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ['train', '--dataset', str(photographs), '--method', 'lift', '--net', 'vit_test', '--weights',
            str(small_nets[1]['vit_test']), '--size', '16', '--epochs', '2', '--no-rl', '--out', 'out']
    r = CliRunner().invoke(app, args)
    assert r.exit_code == 0, (r.output, r.exception)
    assert (tmp_path/'out'/'model'/'model.json').exists() and 'pretrained vit_test' in r.output
    r = CliRunner().invoke(app, ['predict', 'out/model', str(photographs/'red')])
    assert r.exit_code == 0, r.output
    args[args.index('vit_test')] = 'resnet18'
    r = CliRunner().invoke(app, [*args[:args.index('--weights')], '--size', '16', '--out', 'other'])
    assert r.exit_code == 2


def test_a_net_that_is_no_transformer():
    with pytest.raises(ValueError, match='this ResNet is no vision transformer.*vit_b_16'):
        methods['lift'].learner(digits_lt(device='cpu'), torchvision.models.resnet18(num_classes=10))


def test_recipes():
    assert {o.name: o.reported for o in later_recipes.values()} == {
        'lift/CIFAR100-LT': {'all': 81.7}, 'lift/ImageNet-LT': {'all': 78.3}, 'lift/Places-LT': {'all': 52.2}}
    assert not set(later_recipes) & set(recipes)
    for name, o in later_recipes.items():
        assert recipe(name) is o and matching(name) == [o] and any('Not run' in n for n in o.notes)
        s = o.settings()
        assert (s.method, s.net, s.pretrained, s.epochs, s.lr, s.bs, s.wd, s.schedule, s.nesterov) == \
            ('lift', 'ViT-B-16-quickgelu', True, 10, .01, 128, 5e-4, 'cosine', False)
    assert len(matching(None)) == len(recipes)+len(later_recipes)
