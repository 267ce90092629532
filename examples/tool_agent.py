"""A tool-calling agent: the model calls Python functions and gets their results."""

import json

from accounting import show

import branchwise as bw

PRICES = {"honey cake": 4, "rope net": 31, "lantern": 12}


def get_weather(city: str) -> dict:
    """Get the weather."""
    return {"status": "sunny", "temperature": len(city) + 12}


def check_price(item: str) -> dict:
    """Check the price."""
    return {"price": PRICES[item]} if item in PRICES else {"error": "not found"}


REQUESTS = [
    "Please get the weather. The city is Zemol.",
    "Can you check the price with item lantern.",
    "Check the price: item = stone",
]


@bw.function
def agent(s, request):
    s += bw.user(request)
    return bw.tool_loop(s, [get_weather, check_price], max_tokens=80)


def work() -> str:
    lines = []
    states = agent.run_batch([{"request": request} for request in REQUESTS], temperature=0)
    for request, state in zip(REQUESTS, states, strict=True):
        lines.append(f"  {request}")
        lines += [f"    {call.name}({json.dumps(dict(call.arguments))}) = {call.content}" for call in state.ret_value]
        lines.append(f"    {state['answer']}")
    return "\n".join(lines)


if __name__ == "__main__":
    show("A tool-calling agent", work)
