r"""Answers that graders are known to get wrong, in both directions: (reference, what a response has boxed, right)."""

from __future__ import annotations

import pytest

from megatron_apo.config import RewardConfig
from megatron_apo.rewards import GradeRequest, get_reward
from megatron_apo.rewards.answers.writing import tidy
from megatron_apo.rewards.pool import Grade, RewardPool
from tests.benchmarks.graders import hostile, read_pairs

KINDS: dict[str, list[tuple[str, str, int]]] = {
    "thousands": [
        (r"2\,500", "2500", 1),
        (r"2\,500", "502", 0),
        (r"2\,500", "2", 0),
        (r"10\,000", "10000", 1),
        (r"10\,000", r"20\,000", 0),
        (r"10\,000", "0", 0),
        ("2500", r"2{,}500", 1),
        ("2500", r"2\!\,500", 1),
        ("2500", r"2,\!500", 1),
        ("2500", r"2\ 500", 1),
        ("2500", "2~500", 1),
        ("2500", "2\u202f500", 1),
        ("1234567", "1,234,567", 1),
        ("1234567", r"1\,234\,568", 0),
        ("(1, 234)", "(1,234)", 1),
        ("1234", "(1,234)", 0),
        (r"3\,5", "35", 0),
        ("2500.75", "2,500.75", 1),
    ],
    "digits": [
        (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}", 0),
        (r"\frac{1}{2^{99}}", r"2^{-99}", 1),
        (r"\frac{1}{2004!}", r"\frac{1}{2006!}", 0),
        (r"\frac{1}{2004!}", r"\frac{2005}{2005!}", 1),
        ("1e-7", "2e-7", 0),
        ("1e-7", r"10^{-7}", 1),
        ("1e-7", "0", 0),
        ("123456789012345678901", "123456789012345678902", 0),
        (r"2^{100}", "1267650600228229401496703205376", 1),
        (r"2^{100}", "1267650600228229401496703205377", 0),
        (r"\frac{1}{3}", "0.333333", 0),
        ("0.5", "0.54", 0),
        ("0.333", r"\frac{1}{3}", 1),
        ("3.14", r"\pi", 1),
        ("3.14", "3.15", 0),
        (r"1-\frac{1}{2^{100}}", "1", 0),
        (r"10^{10^{10}}", r"10^{10^{11}}", 0),
        (r"9^{9^{9^{9}}}", r"9^{9^{9^{9}}}", 1),
        (r"\sqrt{2}\cdot 10^{-30}", r"\sqrt{3}\cdot 10^{-30}", 0),
    ],
    "more than an expression": [
        (r"1, 2, \ldots, n", r"1, 3, 5, \ldots, 2n-1", 0),
        (r"1, 2, \ldots, n", r"1, 2, 3, \ldots, n", 1),
        (r"1, 2, \ldots, n", "n", 0),
        (r"4210_{5}", r"4210_{6}", 0),
        (r"4210_{5}", r"4210_5", 1),
        (r"4210_{5}", r"4201_5", 0),
        (r"4210_{5}", "5", 0),
        (r"1 \text{ hour } 30 \text{ minutes}", r"1 \text{ hour } 45 \text{ minutes}", 0),
        ("1 hour 30 minutes", "1 hour 45 minutes", 0),
        ("1 hour 30 minutes", "90 minutes", 1),
        ("1 hour 30 minutes", "1", 0),
        (r"\begin{cases}x=1\\y=2\end{cases}", "2", 0),
        (r"\begin{cases}x=1\\y=2\end{cases}", "x=1, y=2", 1),
        (r"\begin{cases}x=1\\y=2\end{cases}", "x=2, y=1", 0),
        (r"n=3k, k \in \mathbb{Z}", "3", 0),
        (r"n=3k, k \in \mathbb{Z}", r"n=3m,\ m\in\mathbb{Z}", 1),
        (r"n=3k, k \in \mathbb{Z}", r"n=3k+1, k\in\mathbb{Z}", 0),
        ("3", r"n=3k, k \in \mathbb{Z}", 0),
        ("2", r"\begin{cases}x=1\\y=2\end{cases}", 0),
        ("3, 5", "5", 0),
        ("5", "3, 5", 0),
        (r"x^2+y^2=1", "1", 0),
    ],
    "decoration": [
        ("12", "12.", 1),
        ("12", "**12**", 1),
        ("12.", "12", 1),
        ("12", r"\$12", 1),
        ("12", r"12\%", 1),
        ("0.5", r"50\%", 1),
        ("0.5", "50", 0),
        ("90", r"90^\circ", 1),
        ("12", r"12\text{ apples}", 1),
        (r"12\text{ apples}", r"12\text{ pears}", 0),
        (r"12\text{ cm}", "12", 1),
        (r"12\text{ cm}", r"12\text{ m}", 0),
        (r"12\text{ cm}", r"120\text{ mm}", 1),
        (r"12\text{ cm}^2", r"12\text{ cm}", 0),
        ("12", r"\text{12}", 1),
        ("12", r"{12}", 1),
        ("12", r"$12$", 1),
        ("-12", "\u221212", 1),
    ],
    "intervals and inequalities": [
        ("(1,4]", r"1 < x \le 4", 1),
        ("(1,4]", r"1 \le x \le 4", 0),
        ("(1,4]", r"4 \ge x > 1", 1),
        (r"x > 3", r"(3, \infty)", 1),
        (r"x > 3", r"[3, \infty)", 0),
        (r"x > 3", r"x < 3", 0),
        (r"x > 3", r"3 < x", 1),
        (r"(-\infty,-1)\cup(5,\infty)", r"x<-1 \text{ or } x>5", 1),
        (r"(-\infty,-1)\cup(5,\infty)", r"x<-1 \text{ or } x \ge 5", 0),
        (r"(-\infty,-1)\cup(5,\infty)", r"(5,\infty)", 0),
        (r"x \ne 2", r"(-\infty,2)\cup(2,\infty)", 1),
        ("[-1,4]", "(-1,4)", 0),
    ],
    "choices": [
        ("B", "(B)", 1),
        ("B", r"\text{B}", 1),
        ("B", r"\textbf{(B)}\ 12", 1),
        ("B", "B. 12", 1),
        ("B", "C", 0),
        ("B", "(C) 12", 0),
        (r"\textbf{(B)}\ 12", "12", 1),
        (r"\textbf{(B)}\ 12", "B", 1),
        (r"\textbf{(B)}\ 12", "(C) 12", 0),
        (r"\textbf{(B)}\ 12", "13", 0),
        ("12", "(B) 12", 1),
        ("A, C", "A", 0),
    ],
}


# Near, and wrong: a reference, and what is boxed.
WRONG = r"""
21/2 | \frac52
10 | 100/3
2 | 20/5
f(n)=2n, n\in\mathbb Z | f(n)=-2n, n\in\mathbb Z
a_n=2n-1, n\ge1 | a_n=2n+1, n\ge0
x=k, y=2k, k\in\mathbb Z | x=k, y=3k, k\in\mathbb Z
x=2k, y=3k, k\in\mathbb Z | x=3k, y=2k, k\in\mathbb Z
n^2=4k, k\in\mathbb Z | n=4k, k\in\mathbb Z
\operatorname{lcm}(a,b) | \operatorname{gcd}(a,b)
\mathrm{sin}(3) | \mathrm{cos}(3)
\operatorname{arccot}3 | 3
12 | \text{twice }12
12 | \text{isn't }12
12 | \text{divisors of }12
\text{loss of }5 | \text{profit of }5
\text{mean}=3,\text{median}=4 | \text{mean}=4,\text{median}=3
\text{max}=5,\text{min}=2 | \text{max}=2,\text{min}=5
A: 3, B: 4 | A: 4, B: 3
3\text{ hours 5 minutes} | 3\text{ hours 7 minutes}
3 | 3\text{ hours 5 minutes}
3\text{ out of 5} | 3\text{ out of 7}
12 | 12\text{ choose 5}
\text{all real numbers except }-1 | \text{all real numbers except }1
\text{slope -2} | \text{slope 2}
\text{translated by (2,-3)} | \text{translated by (2,3)}
m=2, b=3 | (3,2)
(2,\frac\pi3) | (r,\theta)=(\frac\pi3,2)
2,3 | x=3,y=2
12 | x^2=12
12 | 2x=12
12 | -x=12
7 | 2+2=7
5 | x=6=5
5 | x^{-1}=5
\frac12 | \sin A=\frac12
[1,\infty) | |x|\ge1
(1,2) | 1<\sqrt x<2
(3,\infty) | \text{no }x>3
m+n-\gcd(m,n) | m+n-1
\frac{mn}{\gcd(m,n)} | mn
y''+y=0 | y'+y=0
y'=2y | y=2y
f'g+fg' | 2fg
y=f(x-2)+3 | y=fx-2f+3
\frac{\partial f}{\partial x} | \frac{\partial f}{\partial y}
\sum_{i=1}^n x_i | nx_i
\lim_{n\to\infty}a_n | a_n
1.41 | 7 \approx 1.41
0.5 | 3 \approx 0.5
0.75 | \frac{62}{83}
0.25 | \frac{16}{63}
2.0 | \frac{41}{21}
3.5 | 2\sqrt3
2024.5 | 2024.6
12345.6 | 12346
A | A. 3 or B. 4
A | \text{(A) or (B)}
A | (A), (B)
B | \text{(B) is false}
\text{yes} | \text{yes or no}
\text{yes} | \text{Yes if and only if n is even}
\text{no} | \text{no more than 5}
\text{no} | \text{no solution}
|x+3| | x+3
|x-10| | 10-x
y=|x+10| | y=x+10
\lfloor x\rfloor | x
\lfloor\frac n{100}\rfloor | 0
\lfloor\sqrt n\rfloor | \lfloor\frac{n+2}3\rfloor
n! | n!+(n-4)(n-9)
(1,2) | x=1\text{ or }x=2
x=1\text{ or }x=2 | (1,2)
(\pm1,\pm2) | (1,2),(-1,-2)
\pm1\pm\sqrt2 | 1+\sqrt2, -1-\sqrt2
12\text{ mph} | 12\text{ m/s}
12\text{ kWh} | 12\text{ J}
12\text{ quarts} | 12\text{ gallons}
5\text{ decades} | 5\text{ years}
12 | 12\text{ trillion}
12 | 12\text{ dozens}
5 | 5\text{ thirds}
\sin 30^\circ | \sin 30
kx | Kx
\frac Ar | \frac Br
5x-7=0 | 25x^2-49=0
HT | TH
IV | VI
(-\infty,1)\cup(2,\infty) | x<1\text{ or }y>2
1,2,\ldots,n | 1,2,4,\ldots,n
(0,5)\setminus\{7\} | (0,7)\cup(7,5)
f(x)=2x | f(y)=2x
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{vmatrix}1&2\\3&4\end{vmatrix}
0.36 | 1.2.3
5!! | (5!)!
2^{-k},k\ge1 | 2^{-k},k\ge0
5:30 | \frac16
\text{Jones} | \text{Jon}
\mathbb{R} | \text{all real numbers} - \{0\}
\mathbb{R} | \text{all reals} > 5
\emptyset | \text{no solutions} < 5
\text{none} | \text{none}, 5
5 | -\text{five}
5 | \text{five}!
5 | 5M
5 | 5G
2 | 2mg
2nm | 2
4210_5 | 4210_{₆}
23 | 2**3
5 | 5!=120
5 | \displaystyle.5
(1,2) | y=1, x=2
10^{400k}, k\ge0 | 10^{500k}, k\ge0
(1,2) | 2,1
x^2+K | x^2+C
"""
# Written otherwise, and right.
RIGHT = r"""
\frac{21}{2} | 21/2
\frac{11}{12} | 11/12
5 | 10/2
(2,\frac\pi3) | (r,\theta)=(2,\frac\pi3)
m=2, b=3 | (2,3)
\frac x2 | 0.5x
y=\frac12x+1 | y=0.5x+1
\frac{6\pi}5 | 1.2\pi
\sqrt x | x^{0.5}
100(1.05)^t | 100(\frac{21}{20})^t
\log_2 3 | \frac{\ln3}{\ln2}
1+\log_3 2 | \log_3 6
\log_{2}3 | \log_2 3
x^2+1 | (x+i)(x-i)
a^2+b^2 | (a+bi)(a-bi)
\frac{n(n+1)}2 | \sum_{i=1}^n i
\sqrt{ab} | \sqrt a\sqrt b
\sqrt[3]{-8} | -2
12 | =12
12 | \approx 12
5 | 5=x
12 | \textbf{x = 12}
12 | \textcolor{blue}{12}
12 | \text{The answer is 12}
A | \text{Option A}
-5 | \text{-5 apples}
2\sqrt2 | \sqrt8=2\sqrt2
(3,\infty) | \{x\mid x>3\}
1<x<2 | x>1\text{ and }x<2
1000, 2000 | 1,000, 2,000
101, 102, 103 | 101,102,103
\frac12 | \sin 30^\circ
C_1e^x+C_2e^{-x} | C_1e^{-x}+C_2e^{x}
(\pm1,\pm2) | (1,2),(1,-2),(-1,2),(-1,-2)
17 | m+n=17
\text{no} | \text{No, since it is odd}
\log_2 8 | 3
n! | n\cdot(n-1)!
\binom{10}{3} | 120
x=5 | x = 2+3 = 5
4210_5 | 4210₅
101,102,103 | 101, 102, 103
8 | 2**3
0.5 | \displaystyle.5
120 | 5!=120
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{pmatrix}1&2\cr 3&4\end{pmatrix}
(1,2) | 1,2
(1,2) | y=2, x=1
x^2+C | x^2+K
"""


@pytest.fixture(scope="module")
def math():
    return get_reward("math", {})


@pytest.mark.parametrize(
    ("reference", "boxed", "right"), [case for cases in KINDS.values() for case in cases], ids=lambda value: str(value)
)
def test_a_kind(reference: str, boxed: str, right: int, math) -> None:
    assert math(GradeRequest("", rf"so $\boxed{{{boxed}}}$.", reference, "stop")) == right


@pytest.mark.parametrize(
    ("line", "right"),
    [(line, right) for right, lines in enumerate((WRONG, RIGHT)) for line in lines.split("\n") if line],
)
def test_near(line: str, right: int, math) -> None:
    reference, boxed = line.split(" | ", 1)
    assert math(GradeRequest("", rf"so $\boxed{{{boxed}}}$.", reference, "stop")) == right


@pytest.mark.parametrize(
    ("reference", "boxed"),
    [
        ("3", "9" * 1900),
        ("9" * 1899 + "8", "9" * 1900),
        ("3", r"\frac{1}{1+" * 150 + "1" + "}" * 150),
        ("3", "3" + "!" * 20),
        ("3", r"\sum_{k=1}^{1000000}\frac1k"),
        ("3", r"\binom{1000000}{500000}"),
        ("3", r"10^{-999999}"),
        (r"2^{2^k}, k\ge 1", r"2^{2^k}, k\ge 0"),
        (r"x^{x^x}", r"x^{x^{x^x}}"),
        ("3", "{" * 900 + "1" + "}" * 901),
        ("3", "|x" * 200),
        ("3", "(" * 300 + "1" + ")" * 301),
        ("3", r"\pm 1" * 100),
        ("2," * 900, "1," * 900),
    ],
    ids=lambda text: text[:12],
)
def test_what_would_take_for_ever_is_wrong(reference: str, boxed: str) -> None:
    """In a process of its own, whose limit is five seconds."""
    with RewardPool(RewardConfig(name="math", time_limit_s=5.0, memory_limit_gib=2.0, failure_reward=-1.0)) as pool:
        assert pool.grade([GradeRequest("", rf"\boxed{{{boxed}}}", reference, "stop")]) == [Grade(0.0)]


def test_many_boxes_take_no_longer_than_a_few(math) -> None:
    assert math(GradeRequest("", r"\boxed{1}," * 20000, "3", "stop")) == 0


@pytest.mark.parametrize(
    ("reference", "response", "together", "last"),
    [
        ("3,5,7", r"They are $\boxed{3}, \boxed{5}, \boxed{7}$.", 1, 0),
        ("7", r"They are $\boxed{3}, \boxed{5}, \boxed{7}$.", 0, 1),
        ("3, 5", r"$x=\boxed{3}$ or $x=\boxed{5}$", 1, 0),
        ("a=2, b=7", r"$a=\boxed{2}$ and $b=\boxed{7}$", 1, 0),
        ("a=7, b=2", r"$a=\boxed{2}$ and $b=\boxed{7}$", 0, 0),
        ("14", r"\boxed{12}. Wait, that is wrong: \boxed{14}.", 1, 1),
        ("12", r"\boxed{12}. Wait, that is wrong: \boxed{14}.", 0, 0),
        ("3", r"\boxed{3}, \boxed{3}", 1, 1),
        ("3,5", r"\boxed{3} \boxed{5}", 0, 0),  # nothing says that they are a list
        ("3,5,7", r"$\boxed{3}$, $\boxed{5}$, and $\boxed{7}$", 1, 0),
        ("3,5,7", r"$\boxed{3}$, $\boxed{5}$, and $\boxed{9}$", 0, 0),
        ("-3", r"$x = -\boxed{3}$", 1, 1),
        ("3", r"$x = -\boxed{3}$", 0, 0),
        ("3", r"Final answer - \boxed{3}", 1, 1),  # a dash
        ("3", "Steps:\n- \\boxed{3}", 1, 1),  # a bullet
    ],
)
def test_several_boxes(reference: str, response: str, together: int, last: int, math) -> None:
    request = GradeRequest("", response, reference, "stop")
    assert math(request) == together
    assert get_reward("math", {"boxes": "last"})(request) == last


@pytest.mark.parametrize(("name", "wrong"), [("math", 8), ("gsm8k", 1)])
def test_labelled_pairs(name: str, wrong: int) -> None:
    """No wrong response is rewarded, and few right ones are not. The pairs are `tests.benchmarks.graders`'."""
    reward, missed = get_reward(name, {}), []
    for pair in read_pairs("open", name):
        found = reward(GradeRequest("", pair["response"], pair["reference"], "stop"))
        assert found <= pair["right"], pair
        if found < pair["right"]:
            missed.append(pair)
    assert len(missed) <= wrong, missed


def test_what_was_compared_is_told(math) -> None:
    found = math.explain(GradeRequest("", r"$\boxed{502}$", r"2\,500", "stop"))
    assert (found.reward, found.reference, found.answer, found.why) == (0.0, "2500", "502", "value")
    assert math.explain(GradeRequest("", "502", "502", "stop")).why == "nothing is boxed"
    assert math.explain(GradeRequest("", r"\boxed{1,2}", "1, 2", "stop")).reward == 1
    gsm8k = get_reward("gsm8k", {})
    assert gsm8k.explain(GradeRequest("", "#### 5-6", "5", "stop")).why == "no number after ####"


def test_tidied_twice_is_tidied_once() -> None:
    """Of the pairs' texts."""
    for pair in read_pairs("open", "math"):
        once = tidy(pair["reference"])
        assert tidy(once) == once, pair


def test_hostile_input_is_graded(math) -> None:
    """100,000 of them are `python -m tests.benchmarks.graders --hostile 100000`."""
    for response, reference in hostile(400):
        try:
            assert math(GradeRequest("", rf"\boxed{{{response}}}", reference, "stop")) in (0.0, 1.0)
        except ValueError as error:
            assert "no answer in the reference" in str(error)


def test_boxes_that_are_not_known() -> None:
    with pytest.raises(ValueError, match="reward.options.boxes: 'lst' is not known; use together or last"):
        get_reward("math", {"boxes": "lst"})
