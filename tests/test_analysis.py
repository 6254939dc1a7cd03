"""What tokens change, against decoding by hand."""

import pytest
import torch

from titok_fast.analysis import code_colors, codebook, other_codes, token_changes
from titok_fast.models import TiTok


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = TiTok.from_config("titok-digits").eval()
    with torch.no_grad():  # fresh weights decode almost to black
        model.decoder.conv_out.bias.fill_(0.5)
        model.decoder.conv_out.weight.mul_(40)
    return model


@pytest.mark.parametrize("replacement", ["nearest", "farthest"])
def test_each_token_is_replaced_alone(model, replacement):
    tokens = torch.randint(256, (16,))
    result = token_changes(model, tokens, replacement=replacement, batch_size=5)
    before = model.decode(tokens[None])[0]
    torch.testing.assert_close(result.reconstruction, before, rtol=0, atol=1e-6)
    for i in (0, 4, 5, 15):
        changed = tokens.clone()
        changed[i] = result.replacements[i]
        after = model.decode(changed[None])[0]
        torch.testing.assert_close(result.images[i], after, rtol=0, atol=1e-6)
        expected = (after - before).abs().mean(0)
        assert expected.max() > 1e-4
        torch.testing.assert_close(result.changes[i], expected, rtol=0, atol=1e-6)
    assert result.changes.shape == (16, 32, 32)


def test_other_codes(model):
    codes = codebook(model)
    tokens = torch.tensor([7, 7, 0, 255])
    distance = torch.stack([(codes.double() - codes[t].double()).norm(dim=1) for t in tokens])
    assert other_codes(codes, tokens, "farthest").tolist() == distance.argmax(1).tolist()
    for row, token in zip(distance, tokens, strict=True):
        row[token] = torch.inf
    assert other_codes(codes, tokens, "nearest").tolist() == distance.argmin(1).tolist()
    twins = torch.zeros(3, 2)
    assert other_codes(twins, torch.tensor([0, 1]), "nearest").tolist() == [1, 0]
    assert other_codes(twins, torch.tensor([0, 1]), "farthest").tolist() == [1, 0]


def test_latents_are_replaced_by_zero():
    size = {"width": 32, "num_layers": 1, "num_heads": 2}
    vq_model = {
        "quantize_mode": "vae", "token_size": 4, "num_latent_tokens": 3, "is_legacy": False,
        "finetune_decoder": False, "vit_enc_model_size": size, "vit_dec_model_size": size,
        "vit_enc_patch_size": 8, "vit_dec_patch_size": 8,
    }  # fmt: skip
    model = TiTok(
        {"model": {"vq_model": vq_model}, "dataset": {"preprocessing": {"crop_size": 16}}}
    ).eval()
    latents = torch.randn(3, 4)
    result = token_changes(model, latents)
    latents[1] = 0
    torch.testing.assert_close(result.images[1], model.decode(latents[None])[0])
    assert result.replacements is None


def test_similar_codes_have_similar_colors():
    codes = torch.randn(64, 6) * torch.tensor([9.0, 6, 4, 1e-3, 1e-3, 1e-3])
    colors = code_colors(codes)
    assert colors.shape == (64, 3) and colors.min() == 0 and colors.max() == 1
    for channel in range(3):  # each principal direction is one channel, up to its sign
        assert len(colors[:, channel].unique()) == 64
        ranks = codes[:, channel].argsort().argsort().float()
        assert torch.corrcoef(torch.stack([ranks, colors[:, channel]]))[0, 1].abs() > 0.9
    assert code_colors(torch.randn(5, 2)).shape == (5, 3)


def test_bad_input(model):
    tokens = torch.zeros(16, dtype=torch.int64)
    with pytest.raises(ValueError, match="replacement: got 'random', allowed are 'nearest'"):
        token_changes(model, tokens, replacement="random")
    with pytest.raises(ValueError, match="tokens_or_latents"):
        token_changes(model, tokens[:3])
