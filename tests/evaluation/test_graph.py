"""The picture of a NAC's graph."""

import io

import pytest
import torch
from PIL import Image
from testing_utils import nac

from m2mkd.evaluation.graph import density, draw_graphs, signature_affinity


def test_affinity_follows_the_signatures() -> None:
    model = nac(kernel_truncation=0.9, kernel_bandwidth=0.5)
    affinity = signature_affinity(model)
    signatures = torch.nn.functional.normalize(
        torch.cat((model.nac.input_latents.signatures, model.nac.mediator_latents.signatures)), dim=-1
    )
    distance = 1 - signatures[3:] @ signatures.T
    expected = torch.where(distance <= 0.9, (-distance / 0.5).exp(), 0.0)
    torch.testing.assert_close(affinity, expected.detach(), atol=1e-6, rtol=1e-5)


def test_density_leaves_out_inputs_and_the_latents_themselves() -> None:
    affinity = torch.tensor([[1.0, 1.0, 0.5, 0.0], [1.0, 0.0, 1.0, 0.0], [1.0, 0.2, 0.3, 1.0]])
    assert density(affinity) == pytest.approx(3 / 6)


def test_one_panel_a_model() -> None:
    one, three = (
        Image.open(io.BytesIO(draw_graphs({str(index): signature_affinity(nac(index)) for index in range(count)})))
        for count in (1, 3)
    )
    assert three.width > 2 * one.width
    assert len(three.convert("RGB").getcolors(maxcolors=2**20)) > 10
