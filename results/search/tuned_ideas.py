"""Gains of changes to Reflective Learning over tuned networks, on images that are in no test set.

`python results/search/tuned_ideas.py text tuned 100,101,102 default,kr,ks` prints rows of tuned_ideas.json. All
variants and seeds of a call are trained at once, on the same images, initial weights, batches and dropout masks, so a
run costs a second or two. The review and the summary are written here a second time, for a batch of networks.
`cifar` takes the features in the package (the training images alone), `text` and `tabular` their data without the test
rows; `magnetic` and `grocery` need a folder of that name in fastai's data folder, whose test images are not used.
"""
import json
import math
import sys
from functools import cache
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
from ltrl_fastai.all import frozen_loaders
from ltrl_fastai.data import beds
from ltrl_fastai.data.imbalance import imbalanced_counts
from ltrl_fastai.data.shipped import shipped_photos
from ltrl_fastai.methods.posthoc import best_tau

settings = {
    'tuned': { # what tuning chose without Reflective Learning, in results/tuned-*
        'cifar': dict(epochs=5, mixup=True), 'grocery': dict(tau=1.5, wd=5e-3), 'magnetic': dict(mixup=True),
        'tabular': dict(posthoc=True), 'text': dict(dropout=.5)},
    '10 epochs, mixup': {'cifar': dict(epochs=10, mixup=True)},
    '20 epochs, mixup': {'cifar': dict(mixup=True)},
    'plain': dict.fromkeys(('cifar','grocery','magnetic','tabular','text'), {}),
}
ideas = { # the parts of each variant; predictions are in tuned_ideas.json
    'base': {}, 'kr': dict(kr={}), 'ks': dict(ks={}), 'default': dict(kr={}, ks={}),
    'by_class': dict(kr=dict(by_class=True), ks={}), 'mixed': dict(kr=dict(mixed=True), ks=dict(mixed=True)),
    'spread': dict(spread=True), 'drawn': dict(drawn=.001),
    'kc_head': dict(kc_head=1.), 'kc_head.3': dict(kc_head=.3), 'default+kc_head.3': dict(kr={}, ks={}, kc_head=.3),
    'tau1.25': dict(tau=1.25), 'tau1.5': dict(tau=1.5),
}


@cache
def pool(bed):
    "Vectors, classes, and for the table whether a row is in the region of the validation rows"
    if bed=='cifar': return *shipped_photos()['train'],None
    if bed=='text':
        x,labels,_ = beds._character_vectors(18)
        counts = np.bincount(labels)
        every = np.arange(len(labels))
        test = beds._draw_of_each(labels, every, np.minimum(counts//3, 40), np.random.default_rng(0))
        rest = np.setdiff1d(every, test)
        return torch.from_numpy(x[rest]),torch.from_numpy(labels[rest]),None
    if bed=='tabular':
        x,labels,_,place,gap = beds._terrain()
        west = place<.5
        middle = (place>=.5+gap) & (place<.65)
        rows = np.flatnonzero(west | middle)
        return torch.from_numpy(x[rows]),torch.from_numpy(labels[rows]),torch.from_numpy(middle[rows])
    dls = frozen_loaders(Path.home()/'.fastai'/'data'/bed, size=128)
    parts = dls.train_ds,dls.valid_ds
    return torch.cat([o.x for o in parts]).float(),torch.cat([torch.as_tensor(o.targets) for o in parts]),None


def split(bed, seed):
    "Vectors and classes of training, validation and scored images, and the number of classes"
    x,y,held_out = pool(bed)
    draw = np.random.default_rng(seed)
    labels = y.numpy()
    n_classes = int(labels.max())+1
    profile = imbalanced_counts(350, n_classes, 100) if bed=='cifar' else None
    parts = [],[],[]
    for c in range(n_classes):
        if held_out is not None:
            outside = held_out.numpy()
            away = draw.permutation(np.flatnonzero((labels==c) & outside))
            near = draw.permutation(np.flatnonzero((labels==c) & ~outside))
            n_valid = min(20, len(away)//3)
            n_train = max(1, round(len(near)*5000/(~outside).sum()))
            drawn = near[:n_train],away[:n_valid],away[n_valid:n_valid+100]
        else:
            ids = draw.permutation(np.flatnonzero(labels==c))
            n_valid,n_scored,n_train = split_sizes(bed, len(ids), None if profile is None else profile[c], len(labels))
            held = n_valid+n_scored
            drawn = ids[held:][:n_train],ids[:n_valid],ids[n_valid:held]
        for part,ids_of_part in zip(parts, drawn): part.extend(ids_of_part)
    return [(x[ids].float(), y[ids]) for ids in parts],n_classes


def split_sizes(bed, n, n_train, n_all):
    "Validation, scored and training images of a class of `n` images"
    if bed=='cifar': return 10,min(60, n-10-n_train),n_train
    if bed=='text':
        n_valid = min(max(n//10, 1), 10)
        n_scored = min(n//3, 40)
        return n_valid,n_scored,max(1, round((n-n_valid-n_scored)*4000/(n_all-900)))
    n_valid,n_scored = (min(40, max(1, round(.15*n))), min(60, max(1, round(.25*n)))) if n>=3 else (0,0)
    return n_valid,n_scored,n-n_valid-n_scored


class Nets:
    "`V` variants x `S` seeds of the network 'mlp256'; the first layer of a seed's variants is one matrix"
    def __init__(self, seeds, inits, n_in, n_classes, hidden=256):
        self.S,self.V,self.hidden = len(seeds),len(inits),hidden
        made = [[self._layers(seed, i, n_in, n_classes) for i in inits] for seed in seeds]
        self.first = torch.stack([torch.cat([o[0] for o in of_seed], 1) for of_seed in made])
        self.head = torch.stack([torch.stack([o[1] for o in of_seed]) for of_seed in made], 1)
        self.bias = torch.stack([torch.stack([o[2] for o in of_seed]) for of_seed in made], 1)
        shape = self.S,1,self.V*hidden
        self.scale,self.shift,self.var = [torch.ones(shape), torch.zeros(shape), torch.ones(shape)]
        self.mean = torch.zeros(shape)
        self.params = [self.first, self.head, self.bias, self.scale, self.shift]
        for p in self.params: p.requires_grad_()
        self.momenta = [torch.zeros_like(p) for p in self.params]

    def _layers(self, seed, init, n_in, n_classes):
        g = torch.Generator().manual_seed(1000*init+seed)
        def uniform(*shape, n): return (2*torch.rand(*shape, generator=g)-1)/n**.5
        first = uniform(n_in, self.hidden, n=n_in)
        return first,uniform(self.hidden, n_classes, n=self.hidden),uniform(n_classes, n=self.hidden)

    def features(self, x, training):
        "Input of the head `(V, S, B, hidden)` of `x` `(S, B, D)`"
        a = torch.bmm(x, self.first)
        mean,var = self.mean,self.var
        if training:
            mean = a.mean(1, keepdim=True)
            var = a.var(1, unbiased=False, keepdim=True)
            n = x.shape[1]
            with torch.no_grad():
                self.mean.lerp_(mean, .1)
                self.var.lerp_(var*n/(n-1), .1)
        h = F.relu((a-mean)*(self.scale/(var+1e-5).sqrt())+self.shift)
        return h.view(self.S, -1, self.V, self.hidden).permute(2,0,1,3)

    def logits(self, h): return h@self.head+self.bias[:,:,None]

    @torch.no_grad()
    def predict(self, x):
        return torch.cat([self.logits(self.features(o, False)) for o in x.split(512, 1)], 2)

    @torch.no_grad()
    def step(self, lr, wd):
        "SGD with Nesterov momentum, weight decay in the gradient"
        for p,momentum in zip(self.params, self.momenta):
            grad = p.grad.add(p, alpha=wd)
            momentum.mul_(.9).add_(grad)
            p.sub_(grad.add_(momentum, alpha=.9), alpha=lr)
            p.grad = None


def of_samples(table, rows): return table.gather(1, rows[...,None].expand(-1,-1,table.shape[2]))

def share(lam, own, partner): return own if lam is None else lam*own+(1-lam)*partner


class Parts:
    "What a variant remembers, for all seeds, and its loss"
    def __init__(self, config, S, N, counts, tau, hidden):
        self.config,self.S,self.counts = config,S,counts
        self.C = len(counts)
        self.adjustment = config.get('tau', tau)*counts.clamp(min=1).log()
        self.teachers = torch.zeros(S,N,self.C)
        self.seen = torch.zeros(S, N, dtype=torch.bool)
        self.right = torch.zeros(S, N, dtype=torch.bool)
        self.predictions = torch.eye(self.C).repeat(S,1,1)
        self.sums = torch.zeros(S,self.C,self.C+1)
        self.strength = self.centers = self.rare_grad = None
        self.best = torch.zeros(S)
        self.feature_sums = torch.zeros(S,self.C,hidden)
        self.products = torch.zeros(S,hidden,hidden)

    def start_epoch(self, train, valid):
        "Measure the gap by the counts `(S, 2, C)` of the last epoch"
        included = (train[:,1]>0) & (valid[:,1]>=3)
        fitted = torch.where(included, train[:,0]/train[:,1].clamp(min=1), 0.)
        known = torch.where(included, valid[:,0]/valid[:,1].clamp(min=1), 0.)
        n = included.sum(1).clamp(min=1)
        self.fitted = fitted.sum(1)/n
        self.best = torch.maximum(self.best, known.sum(1)/n)
        self.strength = (self.fitted-self.best).clamp(min=0)
        self.gap_of_class = self._gap_of_thirds(fitted-known, included, valid[:,1])
        self._summarise_predictions()
        self._summarise_features(train[:,1])

    def _gap_of_thirds(self, gaps, included, n_valid):
        "The gap of each third of the classes by size, shrunk towards the overall one by 40 validation images"
        res = torch.zeros(self.S,self.C)
        for third in np.array_split(self.counts.argsort(descending=True).numpy(), 3):
            n = n_valid[:,third].sum(1)
            gap = (gaps[:,third].sum(1)/included[:,third].sum(1).clamp(min=1)).clamp(min=0)
            res[:,third] = ((n*gap+40*self.strength)/(n+40))[:,None]
        return res

    def _summarise_predictions(self):
        n_correct = self.sums[...,-1:]
        means = torch.where(n_correct>0, self.sums[...,:-1]/n_correct.clamp(min=1), self.predictions)
        given = self.counts[:,None]*means
        rows = torch.minimum(given, given.transpose(1,2))/self.counts[:,None].clamp(min=1)
        others = rows-torch.diag_embed(rows.diagonal(dim1=1, dim2=2))
        self.predictions = others+torch.diag_embed(1-others.sum(2))
        self.sums.zero_()

    def _summarise_features(self, n):
        self.centers = self.feature_sums/n.clamp(min=1)[...,None]
        between = torch.einsum('sc,sch,sck->shk', n, self.centers, self.centers)
        self.covariance = (self.products-between)/(n.sum(1)-self.C).clamp(min=1)[:,None,None]
        self.feature_sums.zero_()
        self.products.zero_()

    def loss(self, logits, features, head, y, y2, lam, ids, ids2):
        "Sum of the loss over seeds: `logits` `(S, B, C)`, `features` `(S, B, H)`, `head` `(S, H, C)`, others `(S, B)`"
        trained = logits+self.adjustment
        log_p = F.log_softmax(trained, 2)
        margins = self._margins(head)
        def main(y):
            log_q = log_p if margins is None else F.log_softmax(trained+of_samples(margins, y), 2)
            return -log_q.gather(2, y[...,None])[...,0]
        total = share(lam, main(y), None if lam is None else main(y2)).mean(1)
        kr,ks = self.config.get('kr'),self.config.get('ks')
        if kr is not None and self.strength is not None: total = total+self._review(kr, trained, y, y2, lam, ids, ids2)
        if ks is not None and self.strength is not None: total = total+self._soften(ks, log_p, y, y2, lam)
        if 'drawn' in self.config and self.centers is not None: total = total+self.config['drawn']*self._drawn(head)
        self._remember(logits.detach(), log_p.detach(), features.detach(), y, lam, ids)
        return total.sum()

    def _margins(self, head):
        "Half the variance of logit differences that images of a class lack: `(S, C, C)`"
        if 'spread' not in self.config or self.centers is None: return None
        lacking = (2/self.counts.clamp(min=1)).clamp(max=1)
        products = head.transpose(1,2)@self.covariance@head
        of_class = products.diagonal(dim1=1, dim2=2)
        return .5*lacking[None,:,None]*(of_class[:,None,:]+of_class[:,:,None]-2*products)

    def _review(self, kr, trained, y, y2, lam, ids, ids2, tau=2.):
        log_p = F.log_softmax(trained/tau, 2)
        def terms(ids, y):
            reviewed = self.right.gather(1, ids).float()
            log_q = F.log_softmax((of_samples(self.teachers, ids)+self.adjustment)/tau, 2)
            loss = reviewed*tau**2*(log_q.exp()*(log_q-log_p)).sum(2)
            if 'by_class' in kr: loss = loss*(self.gap_of_class/self.strength.clamp(min=1e-3)[:,None]).gather(1, y)
            return loss,reviewed
        loss,reviewed = terms(ids, y)
        if lam is not None and 'mixed' in kr:
            loss2,reviewed2 = terms(ids2, y2)
            loss,reviewed = share(lam, loss, loss2),share(lam, reviewed, reviewed2)
        return 4*self.strength*self.fitted**4*loss.sum(1)/reviewed.sum(1).clamp(min=1)

    def _soften(self, ks, log_p, y, y2, lam):
        softening = (2*self.strength).clamp(max=.3)[:,None,None]
        def change(y): return softening*(of_samples(self.predictions, y)-F.one_hot(y, self.C))
        difference = change(y)
        if lam is not None and 'mixed' in ks: difference = share(lam[...,None], difference, change(y2))
        return -(difference*log_p).sum(2).mean(1)

    def _drawn(self, head, n_near=5, n_half=10.):
        "Squared distance of class vectors from the mean of those of similar, more frequent classes"
        directions = F.normalize(self.centers-self.centers.mean(1, keepdim=True), dim=2)
        is_larger = self.counts[None,:]>self.counts[:,None]
        similarity = torch.where(is_larger, directions@directions.transpose(1,2), -9.)
        nearest,ids = similarity.topk(min(n_near, self.C-1), 2)
        weights = torch.softmax(nearest/.1, 2)*(nearest>0)
        vectors = head.transpose(1,2)
        near = torch.stack([vectors[s].detach()[ids[s]] for s in range(self.S)])
        target = (weights[...,None]*near).sum(2)/weights.sum(2, keepdim=True).clamp(min=1e-6)
        pull = (weights.sum(2)>0)*n_half/(n_half+self.counts)
        return (pull[...,None]*(vectors-target).square()).sum((1,2))

    @torch.no_grad()
    def _remember(self, logits, log_p, features, y, lam, ids):
        index = ids[...,None].expand(-1,-1,self.C)
        seen = self.seen.gather(1, ids)[...,None]
        old = torch.where(seen, .5, 0.)
        if lam is not None and 'mixed' in (self.config.get('kr') or {}):
            old = torch.where(seen, 1-(1-old)*(2*lam-1)[...,None], old)
        teachers = old*self.teachers.gather(1, index)+(1-old)*logits
        self.teachers.scatter_(1, index, teachers)
        self.seen.scatter_(1, ids, True)
        self.right.scatter_(1, ids, (teachers+self.adjustment).argmax(2)==y)
        correct = (log_p.argmax(2)==y)[...,None].float()
        rows = torch.cat([log_p.exp()*correct, correct], 2)
        self.sums.scatter_add_(1, y[...,None].expand(-1,-1,self.C+1), rows)
        self.feature_sums.scatter_add_(1, y[...,None].expand(-1,-1,features.shape[2]), features)
        self.products += features.transpose(1,2)@features

    @torch.no_grad()
    def correct_head(self, grad, logit_grad, features, y):
        "Remove from the gradient of frequent classes at the head's weights a share of what opposes rare classes"
        rare = (self.counts<self.counts.mean())[y].float()[...,None]
        of_rare = (features*rare).transpose(1,2)@logit_grad
        of_frequent = (features*(1-rare)).transpose(1,2)@logit_grad
        self.rare_grad = of_rare if self.rare_grad is None else .9*self.rare_grad+.1*of_rare
        dot = (of_frequent*self.rare_grad).sum((1,2))
        conflict = (dot/self.rare_grad.square().sum((1,2)).clamp(min=1e-20)).clamp(max=0)
        grad -= self.config['kc_head']*conflict[:,None,None]*self.rare_grad


def count_right(logits, y, n_classes):
    "Correct predictions and images by class `(V, S, 2, C)`"
    right = (logits.argmax(3)==y).float()
    res = torch.zeros(*right.shape[:2], 2, n_classes)
    res[:,:,0].scatter_add_(2, y.expand(right.shape), right)
    res[:,:,1].scatter_add_(2, y.expand(right.shape), torch.ones_like(right))
    return res


def rate_at(pos, epochs, top=.1):
    "fastai's one-cycle schedule of the learning rate"
    warm_up = min(.25, 5/epochs)
    start,stop,pos = (top/25, top, pos/warm_up) if pos<warm_up else (top, top/1e5, (pos-warm_up)/(1-warm_up))
    return start+(1-math.cos(math.pi*pos))*(stop-start)/2


def train(bed, seeds, configs, epochs=20, wd=5e-4, dropout=None, mixup=False, tau=1., posthoc=False):
    "Logits `(V, S, N, C)` and classes `(S, N)` of the scored images, and class counts"
    splits = [split(bed, seed) for seed in seeds]
    n_classes = splits[0][1]
    (x,y),(x_valid,y_valid),(x_scored,y_scored) = [
        [torch.stack([parts[i][k] for parts,_ in splits]) for k in (0,1)] for i in range(3)]
    S,N,n_in = x.shape
    counts = torch.bincount(y[0], minlength=n_classes).float()
    nets = Nets(seeds, [o.get('init', 0) for o in configs], n_in, n_classes)
    variants = [Parts(o, S, N, counts, tau, nets.hidden) for o in configs]
    generators = [torch.Generator().manual_seed(77+seed) for seed in seeds]
    mixing = np.random.default_rng(5)
    torch.manual_seed(5)
    n_steps = math.ceil(N/128)-(N%128==1)
    of_train = of_valid = None
    for epoch in range(epochs):
        if epoch:
            for v,parts in enumerate(variants): parts.start_epoch(of_train[v], of_valid[v])
        of_train = torch.zeros(len(configs), S, 2, n_classes)
        order = torch.stack([torch.randperm(N, generator=g) for g in generators])
        for step in range(n_steps):
            ids = order[:,128*step:128*(step+1)]
            x_batch = torch.stack([x[s,ids[s]] for s in range(S)])
            y_batch = y.gather(1, ids)
            lam = ids2 = y2 = None
            if mixup:
                drawn = mixing.beta(.2, .2, size=ids.shape)
                lam = torch.from_numpy(np.maximum(drawn, 1-drawn)).float()
                partner = torch.stack([torch.randperm(ids.shape[1], generator=g) for g in generators])
                x_batch = torch.lerp(of_samples(x_batch, partner), x_batch, lam[...,None])
                ids2,y2 = ids.gather(1, partner),y_batch.gather(1, partner)
            if dropout: x_batch = F.dropout(x_batch, .6*dropout)
            features = nets.features(x_batch, True)
            kept = features
            if dropout:
                mask = torch.rand(1, *features.shape[1:], generator=generators[0])>dropout
                kept = features*mask/(1-dropout)
            logits = nets.logits(kept)
            logits.retain_grad()
            args = y_batch,y2,lam,ids,ids2
            losses = [o.loss(logits[v], features[v], nets.head[v], *args) for v,o in enumerate(variants)]
            sum(losses).backward()
            for v,o in enumerate(variants):
                if 'kc_head' in o.config: o.correct_head(nets.head.grad[v], logits.grad[v], kept[v].detach(), y_batch)
            nets.step(rate_at((epoch+step/n_steps)/epochs, epochs), wd)
            of_train += count_right(logits.detach(), y_batch, n_classes)
        valid_logits = nets.predict(x_valid)
        of_valid = count_right(valid_logits, y_valid, n_classes)
    scored = nets.predict(x_scored)
    if posthoc:
        log_prior = counts.log().log_softmax(0)
        for v in range(len(configs)):
            for s in range(S): scored[v,s] -= best_tau(valid_logits[v,s], y_valid[s], counts)*log_prior
    return scored,y_scored,counts


def accuracies(predicted, y, counts):
    "Class-balanced accuracy in percent, over all classes, the larger half and the smaller half"
    classes = [c for c in counts.argsort(descending=True, stable=True).tolist() if (y==c).any()]
    right = np.array([(predicted==y)[y==c].float().mean().item() for c in classes])
    half = len(classes)//2
    return np.array([100*right.mean(), 100*right[:half].mean(), 100*right[half:].mean()])


def gains(bed, setting, seeds, names):
    "Rows of tuned_ideas.json; the name 'ensemble' compares four networks of other initial weights with their mean"
    is_ensemble = names==['ensemble']
    configs = [dict(init=i) for i in range(4)] if is_ensemble else [ideas[o] for o in ['base', *names]]
    logits,y,counts = train(bed, seeds, configs, **settings[setting][bed])
    scores = np.stack([[accuracies(z.argmax(1), o, counts) for z,o in zip(of_variant, y)] for of_variant in logits])
    base,others = scores[0],scores[1:]
    if is_ensemble:
        means = logits.softmax(3).mean(0)
        base,others = scores.mean(0),[np.stack([accuracies(p.argmax(1), o, counts) for p,o in zip(means, y)])]
    rows = []
    for name,score in zip(names, others):
        gain = score-base
        error = gain.std(0, ddof=1)/len(seeds)**.5
        rows.append(dict(
            bed=bed, setting=setting, name=name, seeds=len(seeds), without=round(base[:,0].mean(), 2),
            gain=round(gain[:,0].mean(), 2), standard_error=round(error[0], 2), gain_head=round(gain[:,1].mean(), 2),
            gain_tail=round(gain[:,2].mean(), 2)))
    return rows


if __name__=='__main__':
    bed,setting,seeds,names = sys.argv[1:5]
    for row in gains(bed, setting, [int(o) for o in seeds.split(',')], names.split(',')): print(json.dumps(row))
