"""What the JVMs of the tests do, once: a Spark job, of SQL and of Python, and the compiler and the interpreter of Scala.
Java then puts the classes that they need into the file that is given, from which other JVMs map them into memory."""
import os, sys, tempfile
from pathlib import Path
from pyspark.sql import SparkSession

SOURCE = '''case class Point(x: Int, y: Int)
object Points { def main(args: Array[String]): Unit = println(Seq(1, 2).map(o => Point(o, o)).groupBy(_.x)) }'''

os.environ['PYSPARK_SUBMIT_ARGS'] = f'--driver-java-options -XX:ArchiveClassesAtExit={sys.argv[1]} pyspark-shell'
spark = SparkSession.builder.master('local[2]').config('spark.ui.enabled', 'false').getOrCreate()
gateway, jvm = spark.sparkContext._gateway, spark._jvm
assert spark.range(1000).filter('id % 7 = 0').count() == 143
assert spark.sparkContext.parallelize(range(10), 2).map(lambda o: o + 1).sum() == 55
with tempfile.TemporaryDirectory() as d:
    (file := Path(d)/'points.scala').write_text(SOURCE)
    words = ['-usejavacp', '-d', d, str(file)]
    array = gateway.new_array(jvm.java.lang.String, len(words))
    for i, o in enumerate(words): array[i] = o
    assert jvm.scala.tools.nsc.Main.process(array)
settings = jvm.scala.tools.nsc.Settings()
getattr(settings.usejavacp(), 'value_$eq')(True)
assert jvm.scala.tools.nsc.interpreter.IMain(settings).interpret('val x = Seq(1, 2).map(_ + 1)').toString() == 'Success'
spark.stop()
gateway.proc.stdin.close()
sys.exit(gateway.proc.wait())
