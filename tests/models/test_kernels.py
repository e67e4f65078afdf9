"""Fused kernels are taken only where they agree with the plain ones; what is chosen is told and recorded."""

import copy
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._inductor import config as inductor

from tests.models.on_disk import make_backbones
from tests.models.world import make_batch, make_model
from tests.parallel.cases import difference
from tests.training.runs import STAGE_RUN
from wemmu import kernels
from wemmu.backbones.linear_attention import narrow
from wemmu.config.schema import Backbones
from wemmu.config.schema import Kernels as KernelsConfig
from wemmu.config.stage import Optimizer as OptimizerConfig
from wemmu.parallel.adamw import AdamW
from wemmu.prompts import PromptEncoder
from wemmu.recipes.wemmu.loss import FlowMatchingLoss
from wemmu.recipes.wemmu.model import WeMMU

CPU = torch.device("cpu")
DEVICES = [CPU, *([torch.device("cuda")] if torch.cuda.is_available() else [])]
# Stands in for NVIDIA's on machines without it: the interface, and where it keeps the step's number.
APEX = """
import torch

class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def zero_grad(self):
        raise NotImplementedError

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            one, two = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                m, v = state["exp_avg"], state["exp_avg_sq"]
                m.mul_(one).add_(p.grad, alpha=1 - one)
                v.mul_(two).addcmul_(p.grad, p.grad, value=1 - two)
                update = m / (1 - one ** group["step"]) / ((v / (1 - two ** group["step"])).sqrt() + group["eps"])
                p.sub_(group["lr"] * (update + DECAY * group["weight_decay"] * p))
"""
NORM = """
def fused_rms_norm_affine(x, weight, shape, eps):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
"""


@pytest.fixture
def apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of that name, whose optimizer is right."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
            del sys.modules[name]

    forget()
    for part, text in (("optimizers", APEX.replace("DECAY", "1")), ("normalization", "")):
        (tmp_path / "apex" / part).mkdir(parents=True)
        (tmp_path / "apex" / part / "__init__.py").write_text(text)
    (tmp_path / "apex/__init__.py").write_text("")
    (tmp_path / "apex/normalization/fused_layer_norm.py").write_text(NORM)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "apex"
    forget()


def chosen(engine: str = "single", **config: bool) -> kernels.Kernels:
    return kernels.choose(KernelsConfig(**config), engine, CPU, torch.float32, head_dim=32)


def test_without_apex_torchs_own_kernels_are_taken_and_told():
    found = chosen()
    assert (found.adamw, found.norms, found.compiled, found.refused) == ("torch", "plain", False, ())
    assert found.attention in kernels.ATTENTION.values()
    assert found.attention in kernels.attention_kernels(CPU, torch.float32, None)
    assert found.masked_attention in str(found)
    assert chosen(fused_norms=True).norms == "torch"


def test_apex_is_taken_where_it_agrees(apex: Path):
    found = chosen(fused_norms=True)
    assert (found.adamw, found.norms, found.refused) == ("Apex", "Apex", ())
    assert chosen(engine="zero3").adamw == "torch"


def test_where_ranks_differ_the_kernel_that_all_can_take_is_taken(apex: Path):
    """Of two ranks, the second answers as a machine without Apex and with other attention."""

    others = iter([kernels.NO_APEX])

    def gather(own: bool | str | tuple) -> list:
        match own:
            case bool():
                return [own, False]
            case str():
                return [own, "another"]
            case _:
                return [own, ("b", next(others, None))]

    found = kernels.choose(KernelsConfig(fused_norms=True), "single", CPU, torch.float32, 32, gather)
    assert (found.adamw, found.norms) == ("torch", "torch")
    assert found.refused == ("rank 1 on b: Apex is not installed",)
    assert found.attention.endswith(" or another")
    assert kernels.first_objection([("a", None), ("b", "no"), ("c", "never")]) == "rank 1 on b (and 1 more): no"
    assert kernels.first_objection([("a", None), ("b", None)]) is None
    assert kernels.first_objection([("a", "no")]) == "no"


@pytest.mark.parametrize(
    ("file", "text", "name"),
    [
        ("optimizers/__init__.py", APEX.replace("DECAY", "0"), "FusedAdam"),
        ("optimizers/__init__.py", APEX.replace("update = m", "update = float('nan') * m"), "FusedAdam"),
        ("optimizers/__init__.py", APEX.replace("@torch.no_grad()", "").replace("DECAY", "None"), "FusedAdam"),
        ("normalization/fused_layer_norm.py", NORM.replace("+ eps", "+ 0.01"), "Apex's norm"),
    ],
    ids=["without decay", "nan", "fails", "norm"],
)
def test_a_kernel_that_disagrees_or_fails_is_refused_with_a_sentence(apex: Path, file: str, text: str, name: str):
    (apex / file).write_text(text)
    found = chosen(fused_norms=True)
    assert name in found.refused[0]
    assert found.refused[0] in str(found)
    assert (found.norms if "norm" in name else found.adamw) == "torch"


def test_both_optimizers_train_and_resume_alike(apex: Path):
    optimizer = OptimizerConfig(lr=1e-2, vector_scale=2.0, weight_decay=0.1)
    run = STAGE_RUN.changed({"stage.optimizer": optimizer})
    generator = torch.Generator().manual_seed(0)
    shapes = {"bridge.matrix": (6, 5), "bridge.vector": (5,)}
    first = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    gradients = [{n: torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in range(4)]

    def go(optimizer: AdamW, some: list[dict[str, Tensor]]) -> AdamW:
        for each in some:
            for name, weight in optimizer.weights.items():
                weight.grad = each[name].clone()
            optimizer.step(0.7, torch.ones(()))
            optimizer.zero_grad()
        return optimizer

    plain, fused = (go(AdamW({n: t.clone() for n, t in first.items()}, run, apex=a), gradients) for a in (False, True))
    half = go(AdamW({n: t.clone() for n, t in first.items()}, run, apex=False), gradients[:2]).state()
    resumed = AdamW({n: t.clone() for n, t in half.weights.items()}, run, apex=True)
    assert resumed.state().steps == 0
    for name in shapes:
        resumed.state().exp_avg[name].copy_(half.exp_avg[name])
        resumed.state().exp_avg_sq[name].copy_(half.exp_avg_sq[name])
    resumed.on_restore(2)
    go(resumed, gradients[2:])
    for other in (fused, resumed):
        assert other.state().steps == 4
        for field in ("weights", "exp_avg", "exp_avg_sq"):
            for name in shapes:
                torch.testing.assert_close(getattr(other.state(), field)[name], getattr(plain.state(), field)[name])


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("dtype", kernels.NORM_BOUND)
def test_torchs_fused_norm_is_the_plain_one_within_its_bound(device: torch.device, dtype: torch.dtype):
    assert kernels.norm_difference(kernels.torch_norm, device, dtype) <= kernels.NORM_BOUND[dtype]
    without_weight = lambda x, weight, eps: kernels.torch_norm(x, torch.ones_like(weight), eps)  # noqa: E731
    with pytest.raises(RuntimeError, match="not have been used"):
        kernels.norm_difference(without_weight, device, dtype)


def test_the_plain_norm_here_is_that_of_the_layers(model: WeMMU):
    norm, x = model.bridge.pathway.norm, torch.randn(3, 128)
    with torch.no_grad():
        assert torch.equal(kernels.plain_norm(x, norm.weight, norm.variance_epsilon), norm(x))


def gradients(model: WeMMU, encoder: PromptEncoder) -> dict[str, Tensor]:
    model.freeze_all_but(("vae_branch", "pathway", "position_mlp", "dit"))
    model.zero_grad()
    FlowMatchingLoss(model, STAGE_RUN)(make_batch(encoder, [0, 1]), 0).values.sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def apply(found: kernels.Kernels, model: WeMMU) -> None:
    language = model.vlm.language_model
    layers = [*model.bridge.pathway.layers, *model.dit.transformer_blocks]
    if found.compiled:
        layers += [*model.vlm.alike_layers(), *model.vae.compilable()]
    kernels.apply(found, type(language.norm), [language, model.bridge.pathway], layers)


def assert_like(found: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    off, name = difference(found, plain, floor=1e-3)
    assert off < 1e-4, name


def test_a_model_with_fused_norms_has_the_gradients_of_one_without(
    backbones: Backbones, encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch
):
    model = make_model(backbones)
    plain, calls = gradients(model, encoder), []
    monkeypatch.setattr(
        kernels, "norm_kernels", lambda apex: {"torch": lambda *args: calls.append(1) or kernels.torch_norm(*args)}
    )
    apply(chosen(fused_norms=True), model)
    assert_like(gradients(model, encoder), plain)
    norms = sum(isinstance(m, type(model.bridge.pathway.norm)) for m in model.bridge.pathway.modules())
    assert len(calls) > norms, "the VLM's and the pathway's norms are called through the kernel"


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("qk_norm", [None, "rms_norm_across_heads"])
def test_narrow_linear_attention_rounds_about_as_diffusers_does(device: torch.device, qk_norm: str | None):
    torch.manual_seed(0)
    widths = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 32, "cross_attention_dim": 64}
    block = SanaTransformerBlock(64, 2, 32, qk_norm=qk_norm, **widths).to(device)
    x, upstream = torch.randn(2, 2, 300, 64, device=device)

    def outcome(dtype: torch.dtype) -> Tensor:
        """The output and all gradients."""
        part, leaf = block.attn1.to(dtype), x.to(dtype).requires_grad_()
        y = part(leaf)
        found = y.detach(), *torch.autograd.grad(y, [leaf, *part.parameters()], upstream.to(dtype))
        return torch.cat([one.float().flatten() for one in found])

    plain = outcome(torch.bfloat16)
    # With the weights that bfloat16 has rounded.
    exact = outcome(torch.float32)
    narrow(block)
    torch.testing.assert_close(outcome(torch.float32), exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))
    off = [float((found - exact).norm() / exact.norm()) for found in (outcome(torch.bfloat16), plain)]
    assert 1e-3 < off[0] < 1.5 * off[1]


def test_an_autoencoder_in_channels_last_makes_the_same_latents_in_the_same_order(model: WeMMU):
    assert not KernelsConfig().channels_last
    assert chosen(channels_last=True).channels_last
    assert "channels_last" in str(chosen(channels_last=True))
    images, seen = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), []
    vae = copy.deepcopy(model.vae)
    plain = vae.encode(images)
    vae.channels_last()
    for layer in vae.vae.encoder.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda _, inputs, y: seen.append(y))
    found = vae.encode(images)
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in seen)
    assert len(seen) > 5
    assert found.stride() == plain.stride()
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))


@pytest.mark.slow
@pytest.mark.skipif(kernels.compiler() is None, reason="torch.compile needs a C++ compiler")
def test_compiled_layers_have_the_gradients_of_plain_ones(tmp_path: Path):
    # Of two layers, since each is compiled for itself.
    backbones = make_backbones(tmp_path, layers=2)
    model, encoder = make_model(backbones), PromptEncoder(backbones.vlm)
    plain, names = gradients(model, encoder), [name for name, _ in model.named_parameters()]
    apply(chosen(compile=True), model)
    assert_like(gradients(model, encoder), plain)
    assert [name for name, _ in model.named_parameters()] == names
    compiled = [*model.bridge.pathway.layers, *model.dit.transformer_blocks]
    assert all("forward" in vars(layer) for layer in compiled)


def test_layers_are_compiled_once_and_not_each_anew(backbones: Backbones, encoder: PromptEncoder):
    """torch gives a function up after eight compilations, without an error: the other layers would stay plain."""
    model = make_model(backbones)
    # A layer of the frozen VLM is two graphs, around the cache; the last one ends there.
    most = {model.bridge.pathway.layers: 2, model.dit.transformer_blocks: 2, model.vlm.alike_layers(): 4}
    for layers, graphs_of in most.items():
        assert len(layers) == 6
        graphs = CompileCounter()
        for layer in layers:
            layer.forward = torch.compile(layer.forward, backend=graphs)
        gradients(model, encoder)
        # The strides of the first layer's input may be others than those of the next ones'.
        assert 1 <= graphs.frame_count <= graphs_of


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match=r"kernels\.compile: there is no C\+\+ compiler"):
        chosen(compile=True)


def test_a_compiler_that_compiles_nothing_leaves_layers_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    # Else what an earlier test compiled would be taken.
    torch.compiler.reset()
    with inductor.patch({"cpp.cxx": ("false",)}):
        why = kernels.no_compiling(CPU)
        assert why.startswith("torch.compile does not work: it fails on this device (")
        with pytest.raises(ValueError, match=r"kernels\.compile: torch\.compile does not work"):
            chosen(compile=True)


def test_triton_writes_where_torch_compile_does_and_not_into_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    # First set, so that it is as it was when the test has ended.
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    # Without a GPU it fails, but later.
    kernels.objection(lambda: kernels.compile_difference(torch.device("cuda", 0)), 1.0)
    assert Path(os.environ["TRITON_CACHE_DIR"]).is_relative_to(tmp_path)


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process as it is, whatever a test makes deterministic."""
    monkeypatch.delenv(kernels.CUBLAS_VARIABLE, raising=False)
    kept = torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = kept[0]
    torch.backends.cuda.enable_cudnn_sdp(kept[1])
    inductor.deterministic = False
    # `setdefault` wrote it, so monkeypatch does not know it.
    os.environ.pop(kernels.CUBLAS_VARIABLE, None)


def test_where_runs_are_to_be_deterministic_an_operation_that_is_not_ends_them_with_its_name(forgotten: None):
    kernels.make_deterministic()
    assert os.environ[kernels.CUBLAS_VARIABLE] in kernels.CUBLAS_WORKSPACES
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
    assert "deterministic" in str(chosen(deterministic=True))


def test_a_workspace_of_cublas_that_forbids_it_is_named(forgotten: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(kernels.CUBLAS_VARIABLE, ":0:0")
    with pytest.raises(ValueError, match=r"sets CUBLAS_WORKSPACE_CONFIG=:0:0, .*use one of :4096:8, :16:8"):
        kernels.make_deterministic()
