"""The page in a real browser: a question is asked, tokens come one by one, and what is shown is what the API says."""

import shutil
import threading
import time

import httpx2
import openai
import pytest
from endpoints import shown_at_questions
from test_openai_client import QUESTION

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("needs Debian's packages chromium and chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for option in (
        "--headless=new", "--no-sandbox", "--disable-background-networking", "--window-size=1200,900",
        f"--user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):  # fmt: skip
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


@pytest.fixture
def page(driver, url):
    driver.get(url)
    wait(lambda: len(driver.find_elements("css selector", "#model option")) == 3)
    yield driver
    assert [line for line in driver.get_log("browser") if line["level"] in ("SEVERE", "WARNING")] == []


def wait(condition, seconds=60):
    latest = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < latest
        time.sleep(0.02)
    return value


def ask(page, question, answers=1):
    """Types a question, and returns the cards with its answers when they are whole."""
    count = len(page.find_elements("css selector", ".answer"))
    page.find_element("id", "question").send_keys(question + "\n")
    wait(lambda: len(page.find_elements("css selector", ".answer[aria-busy=false]")) == count + answers)
    return page.find_elements("css selector", ".answer")[count:]


def shown(card):
    spans = card.find_elements("css selector", ".text span")
    return [(span.get_property("textContent"), span.get_attribute("class")) for span in spans]


def told(url, **how):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    how = {"model": "mine", "messages": [{"role": "user", "content": QUESTION}], **how}
    answer = client.chat.completions.create(**how)
    return [(token["text"], token["source"]) for token in answer.choices[0].spa["tokens"]], answer


def facts(card):
    return card.find_element("css selector", ".facts").text


def test_tokens_come_one_by_one_and_colours_and_counts_are_those_of_the_api(page, url, request):
    tokens, answer = told(url)
    replies = request.getfixturevalue("replies")
    page.find_element("id", "question").send_keys(QUESTION + "\n")
    assert len(shown_at_questions(tokens)) > 4
    for count in shown_at_questions(tokens):  # while the device does not answer, all text before that token is there
        wait(lambda count=count: page.execute_script("return document.querySelectorAll('.text span').length") == count)
        replies.release()
    wait(lambda: page.find_elements("css selector", ".answer[aria-busy=false]"))
    (card,) = page.find_elements("css selector", ".answer")
    assert shown(card) == tokens
    asked = sum(source == "device" for _, source in tokens)
    assert f"{len(tokens)} tokens, {asked} of the device" in facts(card)
    assert f"{answer.spa['exchanges']} exchanges" in facts(card)
    assert f"{answer.spa['bytes_down']:,} bytes down, {answer.spa['bytes_up']:,} up" in facts(card)
    colours = {span.value_of_css_property("color") for span in card.find_elements("css selector", ".text span.device")}
    others = {span.value_of_css_property("color") for span in card.find_elements("css selector", ".text span.cloud")}
    assert len(colours) == len(others) == 1
    assert colours != others
    assert len(card.find_elements("css selector", ".strip i")) == len(tokens)


def test_signs_of_life_between_tokens_are_skipped_and_before_them_say_what_is_waited_for(
    page, url, server, monkeypatch
):
    answer, _ = told(url, model="inner", max_tokens=3)
    monkeypatch.setattr("spa_jax.endpoint.app.SIGN_SECONDS", 0.01)
    monkeypatch.setattr("spa_jax.split.waiting.TELL_EVERY", 0.02)
    engine, may_turn = server[1]._cloud.engine, threading.Event()
    turn = engine.turn
    monkeypatch.setattr(engine, "turn", lambda: may_turn.wait(60) and turn())
    page.find_element("xpath", "//select[@id='model']/option[.='inner']").click()
    page.find_element("css selector", "#network option[value='200']").click()
    page.find_element("id", "limit").send_keys("3")
    page.find_element("id", "question").send_keys(QUESTION + "\n")
    (card,) = wait(lambda: page.find_elements("css selector", ".answer"))
    wait(lambda: "the cloud works, no token yet: " in facts(card))
    may_turn.set()
    wait(lambda: card.get_attribute("aria-busy") == "false")
    assert shown(card) == answer


def test_the_threshold_is_a_slider_that_asks_again(page, url):
    (card,) = ask(page, QUESTION)
    slider = card.find_element("css selector", "input[type=range]")
    assert float(slider.get_property("value")) == 0.5
    page.execute_script(
        "arguments[0].value = 0.75; for (const kind of ['input', 'change']) "
        "arguments[0].dispatchEvent(new Event(kind));", slider,
    )  # fmt: skip
    wait(lambda: card.get_attribute("aria-busy") == "false")
    tokens, answer = told(url, extra_body={"spa": {"threshold": 0.75}})
    assert shown(card) == tokens
    (following,) = ask(page, "And thing 2?")  # goes on from the answer that is shown now
    talk = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": answer.choices[0].message.content},
        {"role": "user", "content": "And thing 2?"},
    ]
    assert shown(following) == told(url, messages=talk)[0]


def test_base_and_s1_stand_beside_it(page, url):
    for name in ("base", "s1"):
        page.find_element("id", f"beside-{name}").click()
    cards = ask(page, QUESTION, answers=3)
    settings = [{}, {"model": "base"}, {"extra_body": {"spa": {"setting": "s1"}}}]
    assert [shown(card) for card in cards] == [told(url, **how)[0] for how in settings]
    assert {source for _, source in shown(cards[1])} == {"cloud"}
    assert {source for _, source in shown(cards[2])} == {"device"}
    for part in (".strip", ".ask"):
        assert [card.find_element("css selector", part).is_displayed() for card in cards] == [True, False, False]


def test_the_next_question_is_asked_in_the_same_conversation(page, url):
    page.find_element("id", "system").send_keys("Be brief.")
    page.find_element("id", "limit").send_keys("12")
    (first,), (second,) = ask(page, QUESTION), ask(page, "And thing 2?")
    text = "".join(text for text, _ in shown(first))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": text},
        {"role": "user", "content": "And thing 2?"},
    ]
    assert shown(second) == told(url, messages=messages, max_tokens=12)[0]
    page.find_element("id", "new").click()
    assert not page.find_elements("css selector", ".answer")


def test_a_conversation_that_begins_in_the_midst_of_an_answer_has_nothing_of_it(page, url):
    page.find_element("css selector", "#network option[value='1000']").click()
    page.find_element("id", "question").send_keys("What is thing 2?\n")
    wait(lambda: page.find_elements("css selector", ".answer .text span"))
    page.find_element("id", "new").click()
    page.find_element("css selector", "#network option[value='0']").click()
    wait(lambda: not page.find_element("id", "stop").is_enabled())
    (card,) = ask(page, QUESTION)
    assert shown(card) == told(url)[0]


def test_what_is_new_is_in_view(page):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 640, "deviceScaleFactor": 1, "mobile": True}
    )
    ask(page, QUESTION)
    (card,) = ask(page, QUESTION)
    edges = "return [arguments[0].getBoundingClientRect().bottom, arguments[1].getBoundingClientRect().top]"
    form = page.find_element("id", "say")
    wait(lambda: (lambda bottom, top: bottom <= top + 1)(*page.execute_script(edges, card, form)), 5)
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_key_that_is_missing_is_asked_for(driver, url):
    driver.get(url)
    wait(lambda: len(driver.find_elements("css selector", "#model option")) == 3)
    driver.execute_script(
        "window.fetch = async (_, {headers}) => new Response('{\"data\": []}', "
        "{status: headers.Authorization === 'Bearer sesame' ? 200 : 401}); loadModels();"
    )
    key, refused = driver.find_element("id", "key"), driver.find_element("id", "refused")
    wait(lambda: refused.is_displayed())
    key.send_keys("sesame\t")
    wait(lambda: not refused.is_displayed())
    assert key.is_displayed()


def test_escape_stops_an_answer_which_is_forgotten_and_an_error_is_shown(page, url):
    page.find_element("css selector", "#network option[value='1000']").click()
    page.find_element("id", "question").send_keys(QUESTION + "\n")
    wait(lambda: page.find_elements("css selector", ".answer .text span"))
    page.find_element("id", "question").send_keys("\ue00c")  # Escape
    wait(lambda: page.find_elements("css selector", ".answer[aria-busy=false]"))
    assert "stopped" in facts(page.find_element("css selector", ".answer"))
    page.find_element("css selector", "#network option[value='0']").click()
    (following,) = ask(page, QUESTION)
    assert shown(following) == told(url)[0]  # as if nothing had been asked before
    page.find_element("id", "limit").send_keys("4000")
    ask(page, "x")
    errors = [line.text for line in page.find_elements("css selector", ".error")]
    assert len(errors) == 1
    assert "do not fit the backbone's context" in errors[0]
    page.get_log("browser")  # a browser notes an answer of status 400 by itself


@pytest.mark.parametrize("width", [320, 1200])
def test_it_has_names_for_screen_readers_and_fits_a_narrow_screen(width, page):
    page.set_window_size(width, 900)
    ask(page, QUESTION)
    assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    unnamed = page.execute_script(
        "return [...document.querySelectorAll('input, select, textarea, button')].filter(node => "
        "!(node.labels?.length || node.textContent.trim())).length"
    )
    assert unnamed == 0
    assert "p(consult) of" in page.find_element("css selector", ".strip").get_attribute("aria-label")
    assert "of the device" in page.find_element("id", "status").get_property("textContent")
    page.set_window_size(1200, 900)


def test_it_loads_nothing_from_elsewhere(url):
    response = httpx2.get(url)
    assert response.headers["content-security-policy"].startswith("default-src 'none'")
    assert "http" not in response.text.replace("http-equiv", "")
