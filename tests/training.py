"""What the tests of training share: small models, tokens, pictures, and tasks that stop."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from titok_fast.models import ARTransformer, MaskGITVQGAN, TiTok
from titok_fast.tokens import TokenFile
from titok_fast.training.evaluation import EVALUATIONS_FILE
from titok_fast.training.generator import GeneratorTask

AR = {
    "vocab_size": 24, "block_size": 9, "class_num": 3, "n_layer": 2, "n_head": 2, "n_embd": 32,
    "resid_dropout_p": 0.1, "ffn_dropout_p": 0.1, "token_drop": 0.1,
}  # fmt: skip
NETWORK = {
    "model_type": "ViT", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "dropout": 0.1, "attn_drop": 0.1, "image_seq_len": 9,
    "condition_num_classes": 3,
}  # fmt: skip
MASKGIT = {"model": {"vq_model": {"codebook_size": 24}, "generator": NETWORK}}
STAGE1 = {
    "model": {
        "vq_model": {
            "codebook_size": 32, "token_size": 8, "use_l2_norm": True, "commitment_cost": 0.25,
            "vit_enc_model_size": {"width": 32, "num_layers": 2, "num_heads": 2},
            "vit_dec_model_size": {"width": 32, "num_layers": 2, "num_heads": 2},
            "vit_enc_patch_size": 4, "vit_dec_patch_size": 4, "num_latent_tokens": 8,
            "finetune_decoder": False, "is_legacy": True,
        }
    },
    "dataset": {"preprocessing": {"crop_size": 16}},
}  # fmt: skip
PROXY = {
    "channel_mult": [1, 1, 2], "hidden_channels": 32, "num_channels": 3, "num_res_blocks": 1,
    "z_channels": 8,
}  # fmt: skip
IBQ = {
    "n_embed": 64, "embed_dim": 16, "use_entropy_loss": True,
    "ddconfig": {
        "double_z": False, "z_channels": 16, "resolution": 16, "in_channels": 3, "out_ch": 3,
        "ch": 32, "ch_mult": [1, 1, 2], "num_res_blocks": 1, "attn_resolutions": [4],
        "dropout": 0.0,
    },
}  # fmt: skip


def quiet(line):
    pass


def token_file(count=40, length=9, codes=24, classes=3, **changes):
    generator = np.random.default_rng(0)
    fields = {
        "tokens": generator.integers(codes, size=(count, length)).astype(np.uint16),
        "image_ids": [f"{i}.png" for i in range(count)],
        "model": "some-tokenizer",
        "fingerprint": "0123456789abcdef",
        "image_size": 32,
        "codebook_size": codes,
        "labels": np.arange(count) % classes,
        "class_names": [str(i) for i in range(classes)],
    }
    return TokenFile(**(fields | changes))


def generator(kind):
    torch.manual_seed(0)
    return kind.from_config(AR if kind is ARTransformer else MASKGIT)


def task_of(kind, task=GeneratorTask):
    return task(generator(kind), token_file())


def titok(**changes):
    torch.manual_seed(0)
    config = copy.deepcopy(STAGE1)
    config["model"]["vq_model"] |= changes
    return TiTok.from_config(config)


@pytest.fixture(scope="module")
def vqgan():
    torch.manual_seed(0)
    model = MaskGITVQGAN.from_config(PROXY).eval()
    nn.init.normal_(model.quantize.embedding.weight)
    return model


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Eight pictures of 24 x 20 pixels, and a broken one."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for i in range(8):
        coarse = generator.integers(256, size=(3, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((24, 20)).save(folder / f"{i}.png")
    (folder / "8.png").write_bytes(b"broken")
    return sorted(map(str, folder.iterdir()))


class Stopped(Exception):
    pass


def stopping(kind, last):
    """A kind of task that is killed in its last loss."""

    class Stopping(kind):
        calls = 0

        def loss(self, network, batch, generator):
            self.calls += 1
            if self.calls == last:
                raise Stopped
            return super().loss(network, batch, generator)

    return Stopping


def evaluations(folder):
    return [json.loads(line) for line in (folder / EVALUATIONS_FILE).read_text().splitlines()]
