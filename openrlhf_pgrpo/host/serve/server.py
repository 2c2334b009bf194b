"""A factorized reward model over HTTP, in the protocol of the host's serve_rm. It runs in the server's process.

The host's script ignores the label of a query. Here the label says whose reward is asked for: it is the user, or an
object that holds the user under `--data.user_key`. In PPO the label is the column of `--data.label_key`.
"""

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from openrlhf.cli.serve_rm import RewardModelProxy

from openrlhf_pgrpo.host.user_rewards import UserRewards
from openrlhf_pgrpo.models.folder import Folder
from openrlhf_pgrpo.models.texts import encode, end_of_text, text_of


def serve(args, folder: Folder) -> None:
    """Serves until it is stopped; nested arguments of the host's script.

    Raises:
        ValueError: a profile that does not fit.
    """
    uvicorn.run(application(UserRewardProxy(args, folder)), host=args.host, port=args.port, log_level="info")


class UserRewardProxy(RewardModelProxy):
    """The host's model behind its server, with users."""

    def __init__(self, args, folder: Folder):
        self.users, self.user_key = UserRewards(folder, args.reward), args.data.user_key
        super().__init__(args)
        self.end = end_of_text(self.tokenizer)

    @torch.no_grad()
    def get_reward(self, queries, labels) -> tuple[list[float], np.ndarray]:
        """Rewards (B,) and base rewards (B, D) of whole texts, prompt and response.

        Raises:
            ValueError: the request does not say whose rewards it asks for.
        """
        labels = [None] * len(queries) if labels is None and isinstance(queries, list) else labels
        if not (_texts(queries) and isinstance(labels, list) and len(queries) == len(labels)):
            raise ValueError(
                "a request needs a list `query` of texts, and an equally long list `labels` of their users, got "
                f"{_kind_of(queries)} and {_kind_of(labels)}"
            )
        users = [label.get(self.user_key) if isinstance(label, dict) else label for label in labels]
        users = [None if user is None else str(user) for user in users]
        texts = [text_of("", query, self.end) for query in queries]
        size, found = self.batch_size or len(texts), []
        for start in range(0, len(texts), size):
            batch = encode(texts[start : start + size], self.tokenizer, self.max_length)
            found.append(self.reward_model(*(tensor.to(self.reward_model.device) for tensor in batch.values())).cpu())
        base_rewards = torch.cat(found).double().numpy()
        return self.users(base_rewards, users).tolist(), base_rewards


def application(proxy: UserRewardProxy) -> FastAPI:
    app = FastAPI()

    @app.post("/get_reward")
    async def get_reward(request: Request):
        try:
            data = await request.json()
            if not isinstance(data, dict):
                raise ValueError(f"a request needs to be an object, got {_kind_of(data)}")
            rewards, base_rewards = proxy.get_reward(data.get("query"), data.get("labels"))
        except ValueError as error:
            return JSONResponse({"detail": str(error)}, status_code=422)
        # One number of each kind for a text: lists among the logs of a sample crash the host's actor.
        logs = {f"base_reward_{number}": column.tolist() for number, column in enumerate(base_rewards.T)}
        return JSONResponse({"rewards": rewards, "scores": rewards, "extra_logs": logs})

    return app


def _texts(values) -> bool:
    return isinstance(values, list) and len(values) > 0 and all(isinstance(value, str) for value in values)


def _kind_of(values) -> str:
    return f"a list of {len(values)}" if isinstance(values, list) else type(values).__name__
