"""Latent consistency distillation, against diffusers' LCM and DDIM and by what it makes."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from small_runs import MODEL, log, recipe, write_features

from pixart import PixArt, PixArtConfig, checkpoints
from pixart.diffusion import NoiseSchedule
from pixart.diffusion.samplers import SAMPLERS
from pixart.training import TrainRecipe, train
from pixart.training.distill import Distillation, consistency, ddim_step, pseudo_huber

SCHEDULE = NoiseSchedule()
BETAS = {"trained_betas": SCHEDULE.betas.tolist(), "clip_sample": False}
DISTILLING = {"distill": {"guidance_scale": 3.0}, "ema_decay": 0.95}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    write_features(folder / "features")
    torch.manual_seed(0)
    teacher = PixArt(PixArtConfig(**MODEL, micro_conditioning=True))
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    teacher.save_pretrained(folder / "teacher")
    return folder


def distilling(folder: Path, name: str, **changes: object) -> TrainRecipe:
    model = {**MODEL, "micro_conditioning": True, "init": str(folder / "teacher")}
    return recipe(folder / name, folder / "features", **{"model": model, **DISTILLING, **changes})


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("t", [19, 499, 999])
def test_consistency_is_what_the_sampler_takes_for_clean(t: int) -> None:
    scheduler = LCMScheduler(**BETAS)
    scheduler.set_timesteps(50)
    x_t, eps = randn(2, 4, 3, 5), randn(2, 4, 3, 5, seed=1)
    expected = scheduler.step(eps, t, x_t).denoised
    got = consistency(SCHEDULE, x_t, eps, torch.tensor([t, t]))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("t", [0, 1, 7])
def test_consistency_near_the_end_by_the_scalings_of_diffusers(t: int) -> None:
    c_skip, c_out = LCMScheduler(**BETAS).get_scalings_for_boundary_condition_discrete(t)
    x_t, eps = randn(1, 4, 3, 5), randn(1, 4, 3, 5, seed=1)
    abar = SCHEDULE.alphas_cumprod[t]
    x_0 = (x_t - (1 - abar).sqrt() * eps) / abar.sqrt()
    got = consistency(SCHEDULE, x_t, eps, torch.tensor([t]))
    expected = (c_skip * x_t + c_out * x_0).float()
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_consistency_at_the_end_changes_nothing() -> None:
    x_0 = randn(2, 4, 3, 5)
    got = consistency(SCHEDULE, x_0, randn(2, 4, 3, 5, seed=1), torch.tensor([0, 0]))
    assert torch.equal(got, x_0)


@pytest.mark.parametrize("t", [39, 519, 999])
def test_a_step_is_that_of_ddim(t: int) -> None:
    scheduler = DDIMScheduler(**BETAS, timestep_spacing="trailing")
    scheduler.set_timesteps(50)
    x_t, eps = randn(1, 4, 3, 5), randn(1, 4, 3, 5, seed=1)
    expected = scheduler.step(eps, t, x_t).prev_sample
    got = ddim_step(SCHEDULE, x_t, eps, torch.tensor([t]), torch.tensor([t - 20]))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_the_loss_by_the_paper(folder: Path) -> None:
    """Algorithm 1 of arXiv:2310.04378 once more, in float64 but for the networks."""
    task = Distillation(distilling(folder, "loss"), torch.device("cpu"))
    assert task.module.y_embedder.dropout == 0
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in task.module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    averaged = copy.deepcopy(task.module)
    with torch.no_grad():
        for parameter in averaged.parameters():
            parameter.mul_(0.9)
    task.averages = dict(averaged.named_parameters())
    batch = task.collate([task.dataset[i] for i in (0, 3, 4, 8, 9)])
    torch.manual_seed(5)
    got = task.loss(task.module, batch)["loss"]

    torch.manual_seed(5)
    x_0 = batch["latent_mean"] + batch["latent_std"] * torch.randn_like(batch["latent_std"])
    n = torch.randint(1, 51, (5,))
    noise = torch.randn_like(x_0).double()
    abar = SCHEDULE.alphas_cumprod
    k = {"image_size": batch["image_size"], "aspect_ratio": torch.ones(5, 1)}
    caption, mask = batch["caption"].float(), batch["caption_mask"]
    # a caption that is dropped keeps its mask
    null = task.module.y_embedder.y_embedding[: caption.shape[1]].expand_as(caption)
    teacher = PixArt.from_pretrained(folder / "teacher").eval()

    def a(t: torch.Tensor) -> torch.Tensor:
        return abar[t].view(-1, 1, 1, 1)

    def noise_in(model, x, t, caption=caption):
        return model(x.float(), t, caption, mask, **k)[:, :4].double()

    def f(model, x, t):
        s = 10 * t.double().view(-1, 1, 1, 1)
        x_0 = (x - (1 - a(t)).sqrt() * noise_in(model, x, t)) / a(t).sqrt()
        return 0.25 / (s**2 + 0.25) * x + s / (s**2 + 0.25).sqrt() * x_0

    t, earlier = 20 * n - 1, (20 * (n - 1) - 1).clamp(min=0)
    with torch.no_grad():
        x_t = a(t).sqrt() * x_0 + (1 - a(t)).sqrt() * noise
        omega = 2.0
        conditional = noise_in(teacher, x_t, t)
        eps = (1 + omega) * conditional - omega * noise_in(teacher, x_t, t, null)
        x_start = (x_t - (1 - a(t)).sqrt() * eps) / a(t).sqrt()
        nearer = a(earlier).sqrt() * x_start + (1 - a(earlier)).sqrt() * eps
        difference = f(task.module, x_t, t) - f(averaged, nearer, earlier)
        expected = ((difference**2 + 1e-6).sqrt() - 1e-3).mean()
    assert got.item() == pytest.approx(expected.item(), rel=1e-4)
    got.backward()
    assert all(p.grad is None for p in task.averages.values())


def test_pseudo_huber_is_square_for_small_and_absolute_for_large() -> None:
    zero = torch.zeros(1)
    assert pseudo_huber(zero + 1e-5, zero, 1e-3).item() == pytest.approx(5e-8, rel=1e-2)
    assert pseudo_huber(zero + 3.0, zero, 1e-3).item() == pytest.approx(3.0 - 1e-3, rel=1e-4)


def test_a_student_learns_resumes_and_is_drawn_with_lcm(folder: Path) -> None:
    constant = {"name": "constant", "warmup_steps": 0}
    whole = distilling(folder, "whole", steps=60, schedule=constant, checkpoint_every=50)
    train(whole, lambda device: Distillation(whole, device))
    losses = [row["loss"] for row in log(whole.output)]
    assert sum(losses[-15:]) < 0.8 * sum(losses[:15])

    broken = distilling(folder, "broken", steps=4, schedule=constant, checkpoint_every=50)
    train(broken, lambda device: Distillation(broken, device))
    longer = broken.model_copy(update={"steps": 8})
    train(longer, lambda device: Distillation(longer, device))
    # the averages, which are the target, go on as well
    assert log(broken.output) == log(whole.output)[:8]


def test_the_exported_pipeline_knows_its_sampler(folder: Path) -> None:
    made = distilling(folder, "export", data={"features": str(folder / "features")})
    task = Distillation(made, torch.device("cpu"))
    made = made.model_copy(
        update={"data": made.data.model_copy(update={"vae": "a", "text_encoder": "b"})}
    )
    task.recipe = made
    task.export(task.module, folder / "export")
    parts = json.loads((folder / "export" / "pipeline" / "pipeline.json").read_text())
    assert parts["sampler"] == "lcm"
    assert parts["sampler"] in SAMPLERS


def test_adapters_can_be_the_student(folder: Path) -> None:
    made = distilling(folder, "adapters", steps=2, lora={"rank": 2})
    tasks = []

    def make(device: torch.device) -> Distillation:
        tasks.append(Distillation(made, device))
        return tasks[0]

    train(made, make)
    names = [name for name, p in tasks[0].module.named_parameters() if p.requires_grad]
    assert names
    assert all(".lora_" in name for name in names)
    assert not any(".lora_" in name for name, _ in tasks[0]._teacher.named_parameters())
    teacher = PixArt.from_pretrained(folder / "teacher")
    assert checkpoints.load_lora(teacher, folder / "adapters" / "lora")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": MODEL}, "distill: .*model.init, the model that teaches"),
        ({"prior": {"folder": "class"}}, "distill: .*goes without prior"),
        ({"parallel": {"strategy": "fsdp"}}, "distill: .*ddp"),
        ({"parallel": {"sequence": 2}}, "distill: .*parallel.sequence 1"),
        ({"distill": {"guidance_scale": 0.5}}, "distill.guidance_scale: got 0.5"),
    ],
    ids=["no_teacher", "prior", "fsdp", "sequence", "guidance"],
)
def test_wrong_settings_are_named(folder: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distilling(folder, "wrong", **changes)
